/* Makes the processor answer CPUID as one with less would: preloaded, for libraries that cannot be told otherwise.
 *
 * Linux lets a thread have CPUID trapped (arch_prctl(ARCH_SET_CPUID, 0)) where the processor can; threads and forks
 * inherit it. The handler asks the processor itself and takes out what is beyond SWIN_CPUID_MASK (avx2, avx_vnni,
 * avx512_vnni). A program's own handler for SIGSEGV, as compilers have one, comes after it. Code that was chosen before
 * this library was loaded, which is the C library's own, is not reached; nor is a program that reads /proc/cpuinfo.
 * Exits with 86 where that cannot be had.
 *
 * Bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static enum { kAvx2, kAvxVnni, kAvx512Vnni } level;
static int masking;
static struct sigaction theirs; /* for SIGSEGV, as the program believes it set */

typedef int (*Sigaction)(int, const struct sigaction*, struct sigaction*);
static Sigaction real_sigaction(void) {
  static Sigaction found;
  if (found == NULL) found = (Sigaction)dlsym(RTLD_NEXT, "sigaction");
  return found;
}

static uint32_t without(uint32_t value, int count, const int* bits) {
  for (int i = 0; i < count; ++i) value &= ~(1u << bits[i]);
  return value;
}
#define WITHOUT(value, ...) \
  value = without(value, sizeof((const int[]){__VA_ARGS__}) / sizeof(int), (const int[]){__VA_ARGS__})

static void mask(uint32_t leaf, uint32_t sub, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
  if (leaf == 7 && sub == 0) {
    WITHOUT(*d, 22, 24, 25); /* AMX: bf16, tile, int8 */
    WITHOUT(*d, 23);         /* AVX512-FP16 */
    if (level == kAvx512Vnni) return;
    WITHOUT(*b, 16, 17, 21, 26, 27, 28, 30, 31); /* AVX-512: F, DQ, IFMA, PF, ER, CD, BW, VL */
    WITHOUT(*c, 1, 6, 11, 12, 14);               /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    WITHOUT(*d, 2, 3, 8);                        /* 4VNNIW, 4FMAPS, VP2INTERSECT */
    if (level == kAvx2) WITHOUT(*c, 8, 9, 10);   /* GFNI, VAES, VPCLMULQDQ: newer than most that end here */
  } else if (leaf == 7 && sub == 1) {
    const uint32_t avx_vnni = *a & 1u << 4; /* the rest: AVX512-BF16, AVX-IFMA, AMX-FP16, AVX-VNNI-INT8, AVX10 */
    *a = level == kAvx2 ? 0 : avx_vnni;
    *b = *c = *d = 0;
  } else if (leaf == 7 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) { /* newer still; AMX's shapes; AVX10's */
    *a = *b = *c = *d = 0;
  } else if (leaf == 0xd && sub == 0) {
    WITHOUT(*a, 17, 18);                              /* AMX's state */
    if (level != kAvx512Vnni) WITHOUT(*a, 5, 6, 7);   /* AVX-512's */
  }
}

static void on_fault(int number, siginfo_t* info, void* opaque) {
  greg_t* r = ((ucontext_t*)opaque)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)r[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) { /* not CPUID: somebody's mistake */
    real_sigaction()(number, &theirs, NULL);
    return; /* to the same instruction, and so to their handler */
  }
  const uint32_t leaf = (uint32_t)r[REG_RAX], sub = (uint32_t)r[REG_RCX];
  uint32_t a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1ul);
  __cpuid_count(leaf, sub, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0ul);
  mask(leaf, sub, &a, &b, &c, &d);
  r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
  r[REG_RIP] += 2;
}

int sigaction(int number, const struct sigaction* wanted, struct sigaction* old) {
  if (number != SIGSEGV || !masking) return real_sigaction()(number, wanted, old);
  const struct sigaction before = theirs;
  if (wanted != NULL) theirs = *wanted;
  if (old != NULL) *old = before;
  return 0;
}

__sighandler_t signal(int number, __sighandler_t handler) {
  struct sigaction action, old;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  return sigaction(number, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}

__attribute__((constructor)) static void begin(void) {
  const char* wanted = getenv("SWIN_CPUID_MASK");
  if (wanted == NULL) return;
  if (strcmp(wanted, "avx2") == 0) {
    level = kAvx2;
  } else if (strcmp(wanted, "avx_vnni") == 0) {
    level = kAvxVnni;
  } else if (strcmp(wanted, "avx512_vnni") == 0) {
    level = kAvx512Vnni;
  } else {
    fprintf(stderr, "SWIN_CPUID_MASK=%s is not one of avx2, avx_vnni, avx512_vnni\n", wanted);
    exit(86);
  }
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  if (real_sigaction()(SIGSEGV, &action, &theirs) != 0 || syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0ul) != 0) {
    perror("CPUID cannot be masked here");
    exit(86);
  }
  masking = 1;
}
