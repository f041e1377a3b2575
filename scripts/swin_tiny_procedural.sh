#!/usr/bin/env bash
# The paper's experiment at its real size, on images that are computed: trains a Swin-T of 224 x 224 on the procedural
# set (docs/data.md), distils it, and evaluates and times every INT8 method on it (Table 2).
#
#   bash scripts/swin_tiny_procedural.sh [options]
#
#   --out FOLDER    where table and plots go, below the repository unless absolute (default results/local/swin_tiny); models
#                   and logs go to its subfolders
#   --device NAME   cpu (default) or cuda
#   --times N       N times as many images in every training stage, and in the distillation (default 1)
#   --precision P   of training and distillation: bf16 (default) or fp32, for CPUs without AVX512-BF16 or AMX
#   --ablations     also four times as many images in the distillation; what the paper leaves open, a temperature (4) and
#                   all blocks replaced at once; and fp32's weights evaluated in bf16
#   -h, --help      show this text
#
# Small images first: a Swin-T learns from 56 x 56 ten times as quickly as from 224 x 224, and its position bias is
# interpolated in between. Three to four hours on 2 cores with AVX512-BF16; a killed run goes on where it stopped.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

out=results/local/swin_tiny device=cpu times=1 precision=bf16 ablations=0
while [ $# -gt 0 ]; do
  case "$1" in
    --out | --device | --times | --precision)
      [ $# -ge 2 ] || usage_error "$0" "$1 needs a value"
      case "$1" in
        --out) out="$2" ;;
        --device) device="$2" ;;
        --times) times="$2" ;;
        --precision) precision="$2" ;;
      esac
      shift
      ;;
    --ablations) ablations=1 ;;
    -h | --help)
      usage_from "$0"
      exit 0
      ;;
    *) usage_error "$0" "unknown option '$1'" ;;
  esac
  shift
done
case "$times" in "" | *[!0-9]* | 0*) usage_error "$0" "--times needs a positive number, found '$times'" ;; esac
case "$precision" in bf16 | fp32) ;; *) usage_error "$0" "--precision needs bf16 or fp32, found '$precision'" ;; esac
case "$device" in cpu | cuda) ;; *) usage_error "$0" "--device needs cpu or cuda, found '$device'" ;; esac
cd "$SWIN_ROOT"

bash scripts/build_ft.sh
python="$(venv_dir)/bin/python"
name=swin_tiny_patch4_window7_224

# train STAGE IMAGES SEED WARM_UP LEARNING_RATE OPTION...: one pass over IMAGES images that no other stage has.
train() {
  local stage="$1" images="$2" seed="$3" warmup="$4" lr="$5"
  shift 5
  "$python" pyharness/train.py --out "$out/$stage" --data "procedural:classes=20,train=$((images * times)),val=2000,seed=$seed" \
    --epochs 1 --warmup-epochs "$warmup" --batch 32 --lr "$lr" --precision "$precision" --eval-every 200 --eval-images 500 \
    --device "$device" "$@"
}

# resize FROM TO SIZE: the model of stage FROM for images of another size, as the file that stage TO begins with.
resize() { "$python" pyharness/convert.py to-timm "$out/$1/model.safetensors" "$out/$2.safetensors" --img-size "$3"; }

train 1_56px 130000 0 0.05 3e-4 --model "$name" --set img_size=56 --name swin_tiny_56 --init identity
resize 1_56px 2_112px 112
train 2_112px 55000 1 0.05 3e-4 --model swin_tiny_56 --weights "$out/2_112px.safetensors"
train 3_112px 62000 3 0.03 3e-4 --model swin_tiny_56 --weights "$out/2_112px/model.safetensors"
resize 3_112px 4_224px 224
train 4_224px 11200 2 0.05 2e-4 --model "$name" --weights "$out/4_224px.safetensors"
train 5_224px 40000 4 0.03 2e-4 --model "$name" --weights "$out/4_224px/model.safetensors"
teacher="$out/5_224px/model.safetensors"

data="procedural:classes=20,train=$((9600 * times))"
# distil FOLDER OPTION...
distil() {
  local folder="$1"
  shift
  "$python" pyharness/distill.py --weights "$teacher" --data "$data,val=100,seed=5" --precision "$precision" \
    --device "$device" --log-every 5 --state-every 30 --out "$out/$folder" "$@"
}
distil student
"$python" pyharness/reproduce_table2.py --models "$name" --weights "$name=$teacher" \
  --student "$name=$out/student/student.safetensors" --data "$data,val=10000,seed=5" --device "$device" \
  --out "$out" --work "$out/work"
# calibrated FOLDER: its student, as calibrated.safetensors there.
calibrated() {
  "$python" pyharness/quantize.py --weights "$out/$1/student.safetensors" --data "$data,val=10000,seed=5" \
    --out "$out/$1/calibrated.safetensors"
}
# evaluated FOLDER GRAPH [SUBFOLDER]: the calibrated student as an engine of that graph, the result in FOLDER or below it.
evaluated() {
  local engine="$out/$1/$2.engine.safetensors"
  "$python" pyharness/convert.py to-engine "$out/$1/calibrated.safetensors" "$engine" --graph "$2"
  "$python" pyharness/evaluate.py "$engine" --data "$data,val=10000,seed=5" --device "$device" --batch 32 \
    --out "$out/$1${3:+/$3}"
}
if [ "$ablations" = 1 ]; then
  distil student_x4 --subset 0.4
  calibrated student_x4
  evaluated student_x4 geluless_int8
  evaluated student_x4 fused_int8 fused
  distil student_t4 --temperature 4
  calibrated student_t4
  evaluated student_t4 geluless_int8
  distil student_at_once --schedule at_once
  calibrated student_at_once
  evaluated student_at_once geluless_int8
  "$python" pyharness/evaluate.py "$teacher" --dtype bf16 --data "$data,val=10000,seed=5" --device "$device" --batch 32 \
    --out "$out/bf16"
fi
say "Files: $out/table2.*, the stages' log.csv, and $out/student/log.csv"
