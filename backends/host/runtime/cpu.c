/* Which CPU features are there, under LLVM's names: by CPUID, and by XCR0 for what the operating system must save. */
#define _GNU_SOURCE
#include "cnnc_rt.h"

#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum reg { EAX, EBX, ECX, EDX };

/* The register state the operating system must switch for the feature to be usable. */
#define STATE_NONE 0u
#define STATE_AVX 0x6u
#define STATE_AVX512 0xe6u
#define STATE_AMX 0x60000u

typedef struct feature {
  const char *name;
  const char *missing;
  uint32_t leaf;
  uint32_t subleaf;
  uint32_t state;
  uint8_t reg;
  uint8_t bit;
} feature;

#define FEATURE(name, leaf, subleaf, reg, bit, state) \
  { name, "this CPU or operating system lacks " name ", which the model was compiled for", leaf, subleaf, state, reg, bit }

static const feature known[] = {
    FEATURE("cmov", 1, 0, EDX, 15, STATE_NONE),
    FEATURE("mmx", 1, 0, EDX, 23, STATE_NONE),
    FEATURE("fxsr", 1, 0, EDX, 24, STATE_NONE),
    FEATURE("sse", 1, 0, EDX, 25, STATE_NONE),
    FEATURE("sse2", 1, 0, EDX, 26, STATE_NONE),
    FEATURE("sse3", 1, 0, ECX, 0, STATE_NONE),
    FEATURE("pclmul", 1, 0, ECX, 1, STATE_NONE),
    FEATURE("ssse3", 1, 0, ECX, 9, STATE_NONE),
    FEATURE("fma", 1, 0, ECX, 12, STATE_AVX),
    FEATURE("cx16", 1, 0, ECX, 13, STATE_NONE),
    FEATURE("sse4.1", 1, 0, ECX, 19, STATE_NONE),
    FEATURE("sse4.2", 1, 0, ECX, 20, STATE_NONE),
    FEATURE("movbe", 1, 0, ECX, 22, STATE_NONE),
    FEATURE("popcnt", 1, 0, ECX, 23, STATE_NONE),
    FEATURE("aes", 1, 0, ECX, 25, STATE_NONE),
    FEATURE("xsave", 1, 0, ECX, 27, STATE_NONE),
    FEATURE("avx", 1, 0, ECX, 28, STATE_AVX),
    FEATURE("f16c", 1, 0, ECX, 29, STATE_AVX),
    FEATURE("rdrnd", 1, 0, ECX, 30, STATE_NONE),
    FEATURE("fsgsbase", 7, 0, EBX, 0, STATE_NONE),
    FEATURE("bmi", 7, 0, EBX, 3, STATE_NONE),
    FEATURE("avx2", 7, 0, EBX, 5, STATE_AVX),
    FEATURE("bmi2", 7, 0, EBX, 8, STATE_NONE),
    FEATURE("avx512f", 7, 0, EBX, 16, STATE_AVX512),
    FEATURE("avx512dq", 7, 0, EBX, 17, STATE_AVX512),
    FEATURE("rdseed", 7, 0, EBX, 18, STATE_NONE),
    FEATURE("adx", 7, 0, EBX, 19, STATE_NONE),
    FEATURE("avx512ifma", 7, 0, EBX, 21, STATE_AVX512),
    FEATURE("clflushopt", 7, 0, EBX, 23, STATE_NONE),
    FEATURE("clwb", 7, 0, EBX, 24, STATE_NONE),
    FEATURE("avx512cd", 7, 0, EBX, 28, STATE_AVX512),
    FEATURE("sha", 7, 0, EBX, 29, STATE_NONE),
    FEATURE("avx512bw", 7, 0, EBX, 30, STATE_AVX512),
    FEATURE("avx512vl", 7, 0, EBX, 31, STATE_AVX512),
    FEATURE("avx512vbmi", 7, 0, ECX, 1, STATE_AVX512),
    FEATURE("avx512vbmi2", 7, 0, ECX, 6, STATE_AVX512),
    FEATURE("gfni", 7, 0, ECX, 8, STATE_NONE),
    FEATURE("vaes", 7, 0, ECX, 9, STATE_AVX),
    FEATURE("vpclmulqdq", 7, 0, ECX, 10, STATE_AVX),
    FEATURE("avx512vnni", 7, 0, ECX, 11, STATE_AVX512),
    FEATURE("avx512bitalg", 7, 0, ECX, 12, STATE_AVX512),
    FEATURE("avx512vpopcntdq", 7, 0, ECX, 14, STATE_AVX512),
    FEATURE("movdiri", 7, 0, ECX, 27, STATE_NONE),
    FEATURE("movdir64b", 7, 0, ECX, 28, STATE_NONE),
    FEATURE("avx512vp2intersect", 7, 0, EDX, 8, STATE_AVX512),
    FEATURE("amx-bf16", 7, 0, EDX, 22, STATE_AMX),
    FEATURE("avx512fp16", 7, 0, EDX, 23, STATE_AVX512),
    FEATURE("amx-tile", 7, 0, EDX, 24, STATE_AMX),
    FEATURE("amx-int8", 7, 0, EDX, 25, STATE_AMX),
    FEATURE("avxvnni", 7, 1, EAX, 4, STATE_AVX),
    FEATURE("avx512bf16", 7, 1, EAX, 5, STATE_AVX512),
    FEATURE("amx-fp16", 7, 1, EAX, 21, STATE_AMX),
    FEATURE("avxifma", 7, 1, EAX, 23, STATE_AVX),
    FEATURE("avxvnniint8", 7, 1, EDX, 4, STATE_AVX),
    FEATURE("avxneconvert", 7, 1, EDX, 5, STATE_AVX),
    FEATURE("amx-complex", 7, 1, EDX, 8, STATE_AMX),
    FEATURE("avxvnniint16", 7, 1, EDX, 10, STATE_AVX),
    FEATURE("prefetchi", 7, 1, EDX, 14, STATE_NONE),
    FEATURE("xsaveopt", 13, 1, EAX, 0, STATE_NONE),
    FEATURE("xsavec", 13, 1, EAX, 1, STATE_NONE),
    FEATURE("lahf", 0x80000001, 0, ECX, 0, STATE_NONE), /* LLVM prints it "sahf" too */
    FEATURE("sahf", 0x80000001, 0, ECX, 0, STATE_NONE),
    FEATURE("lzcnt", 0x80000001, 0, ECX, 5, STATE_NONE),
    FEATURE("sse4a", 0x80000001, 0, ECX, 6, STATE_NONE),
    FEATURE("prfchw", 0x80000001, 0, ECX, 8, STATE_NONE),
    FEATURE("clzero", 0x80000008, 0, EBX, 0, STATE_NONE),
};

/* Which parts of the register state the operating system switches; XGETBV by its bytes, since it needs no -mxsave. */
static uint32_t os_state(void) {
  uint32_t a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) {
    return 0;
  }
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

/* Linux lets a process use the tile registers, 8 KiB for each thread, once it has asked (x86/xstate in its manual). */
static bool granted(uint32_t state) {
  const long request_permission = 0x1023, tile_data = 18;
  return (state & STATE_AMX) == 0 || syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static bool present(const feature *f, uint32_t state) {
  uint32_t regs[4];
  if (!__get_cpuid_count(f->leaf, f->subleaf, &regs[EAX], &regs[EBX], &regs[ECX], &regs[EDX])) {
    return false;
  }
  /* A subleaf beyond the last one repeats another leaf's data on some CPUs. */
  if (f->leaf == 7 && f->subleaf > 0) {
    uint32_t last, b, c, d;
    if (!__get_cpuid_count(7, 0, &last, &b, &c, &d) || last < f->subleaf) {
      return false;
    }
  }
  return (regs[f->reg] >> f->bit & 1u) && (state & f->state) == f->state && granted(f->state);
}

const char *cnnc_rt_missing_feature(const char *const *features, int32_t count) {
  uint32_t state = os_state();
  for (int32_t i = 0; i < count; i++) {
    const feature *found = NULL;
    for (size_t j = 0; j < sizeof known / sizeof known[0]; j++) {
      if (strcmp(features[i], known[j].name) == 0) {
        found = &known[j];
      }
    }
    if (found == NULL) {
      return "the model was compiled for a CPU feature that this version of the runtime does not know";
    }
    if (!present(found, state)) {
      return found->missing;
    }
  }
  return NULL;
}
