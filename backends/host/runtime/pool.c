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

struct cnnc_rt_lane {
  _Alignas(128) cnnc_rt_pool *pool;
  void *scratch;
  pthread_t thread;
  int index;
  int lanes;      /* 1: no barriers */
  uint64_t epoch; /* barriers passed; the same in all lanes */
  bell start;
  bell rounds[ROUNDS];
};

struct cnnc_rt_pool {
  /* What the lanes are to run; written before their start bells ring. */
  const cnnc_rt_job *job;
  cnnc_rt_counter *counters; /* used by the caller's lane only */
  int64_t spin_ns;
  int count;
  uint32_t runs;
  /* 4 * epoch + 1 (value) or + 2 (bug): a kernel failed before that barrier.  Two, since the next kernel may already
   * fail in one lane while another lane still reads how this one went. */
  _Alignas(128) _Atomic uint64_t failed[2];
  cnnc_rt_lane lane[];
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

static void barrier(cnnc_rt_lane *self) {
  cnnc_rt_pool *pool = self->pool;
  uint32_t number = (uint32_t)++self->epoch;
  for (int round = 0, step = 1; step < self->lanes; round++, step *= 2) {
    int to = self->index + step;
    ring(&pool->lane[to < self->lanes ? to : to - self->lanes].rounds[round], number);
    await(&self->rounds[round], number, pool->spin_ns);
  }
}

static int32_t share(int32_t slices, int lanes, int index) { return (int32_t)((int64_t)slices * index / lanes); }

int32_t cnnc_rt_parallel(cnnc_rt_lane *self, cnnc_rt_thunk *thunk, void *const *args, int32_t slices) {
  if (self->lanes == 1) {
    return thunk(args, self->scratch, 0, slices);
  }
  _Atomic uint64_t *failed = &self->pool->failed[self->epoch & 1];
  uint64_t mark = self->epoch * 4;
  int lanes = slices < self->lanes ? slices : self->lanes;
  if (self->index < lanes) {
    int32_t lo = share(slices, lanes, self->index);
    int32_t status = thunk(args, self->scratch, lo, share(slices, lanes, self->index + 1));
    if (status != 0) {
      atomic_store(failed, mark + (status > 0 ? 1 : 2));
    }
  }
  barrier(self);
  uint64_t found = atomic_load_explicit(failed, memory_order_relaxed);
  return found == mark + 1 ? 1 : found == mark + 2 ? -1 : 0;
}

static void *work(void *argument) {
  cnnc_rt_lane *self = argument;
  cnnc_rt_pool *pool = self->pool;
  _mm_setcsr(CNNC_RT_MXCSR);
  for (uint32_t number = 1;; number++) {
    await(&self->start, number, pool->spin_ns);
    const cnnc_rt_job *job = pool->job;
    if (job == NULL) {
      return NULL;
    }
    /* Clocks are the first lane's affair, so `run` and `run_profiled` meet at the same barriers. */
    cnnc_rt_the_model.run(self, job->inputs, job->outputs, job->arena, cnnc_rt_the_model.weights);
  }
}

static void start(cnnc_rt_pool *pool, const cnnc_rt_job *job, int count) {
  pool->job = job;
  pool->runs++;
  for (int i = 1; i < count; i++) {
    ring(&pool->lane[i].start, pool->runs);
  }
}

int32_t cnnc_rt_pool_run(cnnc_rt_pool *pool, const cnnc_rt_job *job, bool alone) {
  cnnc_rt_lane *self = &pool->lane[0];
  self->lanes = alone ? 1 : pool->count;
  pool->counters = job->counters;
  if (!alone && pool->count > 1) {
    start(pool, job, pool->count);
  }
  /* The barrier after the last kernel is where the lanes join again. */
  return job->body(self, job->inputs, job->outputs, job->arena, cnnc_rt_the_model.weights);
}

void cnnc_rt_tick(cnnc_rt_lane *lane, int32_t kernel, int64_t start) {
  cnnc_rt_counter *counter = &lane->pool->counters[kernel];
  counter->ns += (uint64_t)(cnnc_rt_clock() - start);
  counter->calls++;
}

static void stop(cnnc_rt_pool *pool, int started) {
  start(pool, NULL, started);
  for (int i = 1; i < started; i++) {
    pthread_join(pool->lane[i].thread, NULL);
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
         pthread_create(&pool->lane[started].thread, &attributes, work, &pool->lane[started]) == 0) {
    started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return started;
}

int cnnc_rt_pool_create(int threads, char *scratch, size_t scratch_stride, cnnc_rt_pool **out) {
  size_t size = sizeof(cnnc_rt_pool) + (size_t)threads * sizeof(cnnc_rt_lane);
  cnnc_rt_pool *pool = aligned_alloc(128, size);
  if (pool == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  memset(pool, 0, size);
  pool->count = threads;
  pool->spin_ns = threads <= cnnc_rt_allowed_cpus() ? SPIN_NS : 0;
  for (int i = 0; i < threads; i++) {
    pool->lane[i].pool = pool;
    pool->lane[i].index = i;
    pool->lane[i].lanes = threads;
    pool->lane[i].scratch = scratch + (size_t)i * scratch_stride;
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
