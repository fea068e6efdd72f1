/* The thread pool: each worker has a mailbox of its own, spins for a while, then sleeps on a futex.
 *
 * A mailbox is written by the caller only, its answer by the worker only, and they lie on different cache lines
 * (128 bytes apart: the prefetcher of x86 fetches pairs of lines).  A worker that has no share of a job is not
 * woken and reads nothing, so there is no generation it could miss. */
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

/* Long enough to bridge a kernel that runs on one thread only, short enough to cost little when the caller is done. */
#define SPIN_NS 200000
#define STACK_BYTES (1u << 20)
#define DEFAULT_MXCSR 0x1f80

typedef struct worker {
  _Alignas(128) _Atomic uint32_t ticket; /* one more for each job */
  int32_t lo;
  int32_t hi;
  cnnc_rt_thunk *thunk; /* NULL: end */
  void *const *args;
  _Alignas(128) _Atomic uint32_t done; /* the ticket of the last job that is finished */
  _Atomic uint32_t asleep;
  int32_t status;
  _Alignas(128) cnnc_rt_pool *pool; /* from here on never written after the start */
  void *scratch;
  pthread_t thread;
} worker;

struct cnnc_rt_pool {
  _Alignas(128) _Atomic uint32_t caller_asleep;
  _Alignas(128) int count; /* workers, the caller not among them */
  int64_t spin_ns;
  worker workers[];
};

int64_t cnnc_rt_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int cnnc_rt_allowed_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    return CPU_COUNT(&set);
  }
  /* More CPUs than a cpu_set_t holds. */
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online < 1 ? 1 : online > CNNC_RT_MAX_THREADS ? CNNC_RT_MAX_THREADS : (int)online;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }

/* Waits until *word is no longer `old`; *asleep tells the writer of the word that it has to wake us. */
static uint32_t await_change(_Atomic uint32_t *word, uint32_t old, _Atomic uint32_t *asleep, int64_t spin_ns) {
  int64_t deadline = 0;
  do {
    for (int i = 0; i < 128; i++) {
      uint32_t value = atomic_load_explicit(word, memory_order_acquire);
      if (value != old) {
        return value;
      }
      _mm_pause();
    }
    if (deadline == 0) {
      deadline = cnnc_rt_clock() + spin_ns;
    }
  } while (cnnc_rt_clock() < deadline);
  /* Both sides write their own word, then read the other's, in sequentially consistent order: one of them sees it. */
  atomic_store(asleep, 1);
  uint32_t value;
  while ((value = atomic_load(word)) == old) {
    futex_wait(word, old);
  }
  atomic_store(asleep, 0);
  return value;
}

static void *work(void *argument) {
  worker *self = argument;
  cnnc_rt_pool *pool = self->pool;
  uint32_t ticket = 0;
  _mm_setcsr(DEFAULT_MXCSR);
  for (;;) {
    ticket = await_change(&self->ticket, ticket, &self->asleep, pool->spin_ns);
    if (self->thunk == NULL) {
      return NULL;
    }
    self->status = self->thunk(self->args, self->scratch, self->lo, self->hi);
    atomic_store(&self->done, ticket);
    if (atomic_load(&pool->caller_asleep)) {
      futex_wake(&self->done);
    }
  }
}

static void post(worker *to, cnnc_rt_thunk *thunk, void *const *args, int32_t lo, int32_t hi) {
  to->thunk = thunk;
  to->args = args;
  to->lo = lo;
  to->hi = hi;
  atomic_store(&to->ticket, atomic_load_explicit(&to->ticket, memory_order_relaxed) + 1);
  if (atomic_load(&to->asleep)) {
    futex_wake(&to->ticket);
  }
}

static int32_t share(int32_t slices, int threads, int index) {
  return (int32_t)((int64_t)slices * index / threads);
}

int32_t cnnc_rt_pool_run(cnnc_rt_pool *pool, cnnc_rt_thunk *thunk, void *const *args, void *scratch, int32_t slices,
                         int threads) {
  if (threads > slices) {
    threads = slices;
  }
  for (int i = 1; i < threads; i++) {
    post(&pool->workers[i - 1], thunk, args, share(slices, threads, i), share(slices, threads, i + 1));
  }
  int32_t status = thunk(args, scratch, 0, share(slices, threads, 1));
  for (int i = 1; i < threads; i++) {
    worker *other = &pool->workers[i - 1];
    uint32_t ticket = atomic_load_explicit(&other->ticket, memory_order_relaxed);
    if (atomic_load_explicit(&other->done, memory_order_acquire) != ticket) {
      await_change(&other->done, ticket - 1, &pool->caller_asleep, pool->spin_ns);
    }
    /* The first slice that failed decides, as it would with one thread. */
    if (status == 0) {
      status = other->status;
    }
  }
  return status;
}

static void stop_workers(cnnc_rt_pool *pool, int started) {
  for (int i = 0; i < started; i++) {
    post(&pool->workers[i], NULL, NULL, 0, 0);
  }
  for (int i = 0; i < started; i++) {
    pthread_join(pool->workers[i].thread, NULL);
  }
}

int cnnc_rt_pool_create(int threads, char *scratch, size_t scratch_stride, cnnc_rt_pool **out) {
  size_t size = sizeof(cnnc_rt_pool) + (size_t)(threads - 1) * sizeof(worker);
  cnnc_rt_pool *pool = aligned_alloc(128, size);
  pthread_attr_t attributes;
  sigset_t all, before;
  if (pool == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  memset(pool, 0, size);
  pool->count = threads - 1;
  pool->spin_ns = threads <= cnnc_rt_allowed_cpus() ? SPIN_NS : 0;
  if (pthread_attr_init(&attributes) != 0) {
    free(pool);
    return CNNC_RT_ERROR_MEMORY;
  }
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  /* The application's signal handlers are for its own threads. */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int started = 0;
  for (; started < pool->count; started++) {
    worker *self = &pool->workers[started];
    self->pool = pool;
    self->scratch = scratch + (size_t)(started + 1) * scratch_stride;
    if (pthread_create(&self->thread, &attributes, work, self) != 0) {
      break;
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  if (started < pool->count) {
    stop_workers(pool, started);
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
    stop_workers(pool, pool->count);
  }
  free(pool);
}
