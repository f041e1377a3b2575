"""What a machine with a GPU runs beside the package's own programs; scripts/gpu_check.sh starts it."""
