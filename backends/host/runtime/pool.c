/* The threads of a context: every lane walks through all kernels by itself and does its share of the slices; between
 * two kernels the lanes meet at a barrier.  So a kernel costs one hand-over between threads, and nothing is posted.
 *
 * The barrier is a dissemination barrier (Hensgen, Finkel, Manber 1988): in round r, lane i rings lane i + 2^r and waits
 * for lane i - 2^r; after log2(n) rounds everybody has heard of everybody.  Each bell has one writer and one reader and
 * lies on a cache line of its own (128 bytes apart: the prefetcher of x86 fetches pairs of lines).  A waiting lane
 * spins for a while, then sleeps on a futex. */
#define _GNU_SOURCE
#include "cnnc_rt.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

/* Long enough to bridge a kernel that runs on one lane only, short enough to cost little when the caller is done. */
#define SPIN_NS 200000
#define STACK_BYTES (1u << 20)
#define ROUNDS 10 /* 2^10 = CNNC_RT_MAX_THREADS */

/* 2 * the last number rung, plus 1 while the reader sleeps. */
typedef struct bell {
  _Alignas(128) _Atomic uint32_t word;
} bell;

typedef struct lane {
  _Alignas(128) cnnc_rt_pool *pool;
  void *scratch;
  pthread_t thread;
  int index;
  int count;      /* of lanes; 1: no barriers */
  uint64_t epoch; /* barriers passed; the same in all lanes */
  bell start;
  bell rounds[ROUNDS];
} lane;

struct cnnc_rt_pool {
  /* What the lanes run on, NULL to end; written before their start bells ring. */
  const cnnc_rt_bases *bases;
  int64_t spin_ns;
  int count;
  uint32_t runs;
  /* 4 * epoch + 1 (value) or + 2 (bug): a kernel failed before that barrier.  Two, since the next kernel may already
   * fail in one lane while another lane still reads how this one went. */
  _Alignas(128) _Atomic uint64_t failed[2];
  lane lanes[];
};

int64_t cnnc_rt_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int cnnc_rt_allowed_cpus(void) {
  cpu_set_t set;
  long count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
  return count < 1 ? 1 : count > CNNC_RT_MAX_THREADS ? CNNC_RT_MAX_THREADS : (int)count;
}

static void ring(bell *b, uint32_t number) {
  if (atomic_exchange(&b->word, number * 2) & 1) {
    syscall(SYS_futex, &b->word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  }
}

/* The ringer may be one number ahead, and numbers wrap round. */
static bool rung(uint32_t word, uint32_t number) { return (int32_t)((word & ~1u) - number * 2) >= 0; }

static void await(bell *b, uint32_t number, int64_t spin_ns) {
  int64_t deadline = 0;
  do {
    for (int i = 0; i < 128; i++) {
      if (rung(atomic_load_explicit(&b->word, memory_order_acquire), number)) {
        return;
      }
      _mm_pause();
    }
    if (deadline == 0) {
      deadline = cnnc_rt_clock() + spin_ns;
    }
  } while (cnnc_rt_clock() < deadline);
  uint32_t word = atomic_load(&b->word);
  while (!rung(word, number)) {
    uint32_t sleeping = word | 1;
    if (!atomic_compare_exchange_strong(&b->word, &word, sleeping)) {
      continue;
    }
    syscall(SYS_futex, &b->word, FUTEX_WAIT_PRIVATE, sleeping, NULL, NULL, 0);
    word = atomic_load(&b->word);
  }
}

static void barrier(lane *self) {
  cnnc_rt_pool *pool = self->pool;
  uint32_t number = (uint32_t)++self->epoch;
  for (int round = 0, step = 1; step < self->count; round++, step *= 2) {
    int to = self->index + step;
    ring(&pool->lanes[to < self->count ? to : to - self->count].rounds[round], number);
    await(&self->rounds[round], number, pool->spin_ns);
  }
}

static int32_t share(int32_t slices, int lanes, int index) { return (int32_t)((int64_t)slices * index / lanes); }

static int32_t run_step(lane *self, const cnnc_rt_step *step, const cnnc_rt_bases *bases) {
  if (self->count == 1) {
    return step->thunk(bases, self->scratch, 0, step->slices);
  }
  _Atomic uint64_t *failed = &self->pool->failed[self->epoch & 1];
  uint64_t mark = self->epoch * 4;
  int active = step->slices < self->count ? step->slices : self->count;
  if (self->index < active) {
    int32_t lo = share(step->slices, active, self->index);
    int32_t status = step->thunk(bases, self->scratch, lo, share(step->slices, active, self->index + 1));
    if (status != 0) {
      atomic_store(failed, mark + (status > 0 ? 1 : 2));
    }
  }
  barrier(self);
  uint64_t found = atomic_load_explicit(failed, memory_order_relaxed);
  return found == mark + 1 ? 1 : found == mark + 2 ? -1 : 0;
}

static int32_t walk(lane *self, const cnnc_rt_bases *bases) {
  int32_t status = 0;
  for (int32_t k = 0; k < cnnc_rt_the_model.kernel_count && status == 0; k++) {
    status = run_step(self, &cnnc_rt_the_model.steps[k], bases);
  }
  return status;
}

/* The same with clocks, which are the caller's lane's affair; they stop when the slowest lane is done. */
static int32_t walk_timed(lane *self, const cnnc_rt_bases *bases, cnnc_rt_counter *counters) {
  int32_t status = 0;
  int64_t before = cnnc_rt_clock();
  for (int32_t k = 0; k < cnnc_rt_the_model.kernel_count && status == 0; k++) {
    status = run_step(self, &cnnc_rt_the_model.steps[k], bases);
    int64_t now = cnnc_rt_clock();
    counters[k].ns += (uint64_t)(now - before);
    counters[k].calls++;
    before = now;
  }
  return status;
}

static void *work(void *argument) {
  lane *self = argument;
  cnnc_rt_pool *pool = self->pool;
  _mm_setcsr(CNNC_RT_MXCSR);
  for (uint32_t number = 1;; number++) {
    await(&self->start, number, pool->spin_ns);
    const cnnc_rt_bases *bases = pool->bases;
    if (bases == NULL) {
      return NULL;
    }
    walk(self, bases);
  }
}

static void start(cnnc_rt_pool *pool, const cnnc_rt_bases *bases, int count) {
  pool->bases = bases;
  pool->runs++;
  for (int i = 1; i < count; i++) {
    ring(&pool->lanes[i].start, pool->runs);
  }
}

int32_t cnnc_rt_pool_run(cnnc_rt_pool *pool, const cnnc_rt_bases *bases, cnnc_rt_counter *counters, bool alone) {
  lane *self = &pool->lanes[0];
  self->count = alone ? 1 : pool->count;
  if (self->count > 1) {
    start(pool, bases, pool->count);
  }
  /* The barrier after the last kernel is where the lanes join again. */
  return counters != NULL ? walk_timed(self, bases, counters) : walk(self, bases);
}

static void stop(cnnc_rt_pool *pool, int started) {
  start(pool, NULL, started);
  for (int i = 1; i < started; i++) {
    pthread_join(pool->lanes[i].thread, NULL);
  }
}

static int start_threads(cnnc_rt_pool *pool) {
  pthread_attr_t attributes;
  sigset_t all, before;
  if (pthread_attr_init(&attributes) != 0) {
    return 1;
  }
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  /* The application's signal handlers are for its own threads. */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int started = 1;
  while (started < pool->count &&
         pthread_create(&pool->lanes[started].thread, &attributes, work, &pool->lanes[started]) == 0) {
    started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return started;
}

int cnnc_rt_pool_create(int threads, char *scratch, size_t scratch_stride, cnnc_rt_pool **out) {
  size_t size = sizeof(cnnc_rt_pool) + (size_t)threads * sizeof(lane);
  cnnc_rt_pool *pool = aligned_alloc(128, size);
  if (pool == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  memset(pool, 0, size);
  pool->count = threads;
  pool->spin_ns = threads <= cnnc_rt_allowed_cpus() ? SPIN_NS : 0;
  for (int i = 0; i < threads; i++) {
    pool->lanes[i].pool = pool;
    pool->lanes[i].index = i;
    pool->lanes[i].count = threads;
    pool->lanes[i].scratch = scratch + (size_t)i * scratch_stride;
  }
  int started = threads > 1 ? start_threads(pool) : 1;
  if (started < threads) {
    stop(pool, started);
    free(pool);
    return CNNC_RT_ERROR_START_THREAD;
  }
  *out = pool;
  return CNNC_RT_OK;
}

void cnnc_rt_pool_destroy(cnnc_rt_pool *pool, bool forked) {
  if (pool == NULL) {
    return;
  }
  /* In the child of a fork the workers do not exist. */
  if (!forked) {
    stop(pool, pool->count);
  }
  free(pool);
}
