/* The threads of a context.  Every lane walks through the kernels by itself and does its share of the slices of each; a
 * kernel begins when all shares of the one before are done.  Lane 0 is the caller; it alone runs what has one slice.
 *
 * CPUs are not equally fast: some have slower cores, some run other programs beside.  So a share is taken piece by piece:
 * its own lane takes from the front, and a lane that has done its own takes from the back of another's.  A share's slices
 * lie together, as what they read often does, and they did so in the kernel before: it may still be in that CPU's cache.
 *
 * A helper that is not there holds nobody up, either: a run waits for work that a thread has begun, and never for a
 * thread to be given a CPU; on a busy machine the caller does everything, as fast as alone.  Who does a piece does not
 * show in the numbers.
 *
 * A kernel costs one hand-over between CPUs, and no lock.  What other lanes watch is alone on its cache line (128 bytes
 * apart: the prefetcher of x86 fetches pairs of lines).  Who waits spins for a moment, then lets others have the CPU
 * between two looks, then sleeps on a futex. */
#define _GNU_SOURCE
#include "cnnc_rt.h"

#include <limits.h>
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

/* A hand-over takes less, unless both lanes have the same CPU, or another program has one of theirs. */
#define SPIN_NS 5000
/* Long enough to bridge a kernel that runs on one lane only, short enough to cost little when the caller is done. */
#define PATIENCE_NS 200000
#define LOOKS 32
#define STACK_BYTES (1u << 20)
#define END UINT64_MAX

enum { GOOD = 0, BAD_VALUE = 1, BUG = 2, STATUS_BITS = 2 };

/* The most pieces of a share: the last of them is what others may wait for. */
enum { MOST_PIECES = 16, PIECE_BITS = 5, PIECES = (1 << PIECE_BITS) - 1 };

/* Steps are numbered through all runs: number % step_count is the step that comes next, and the number grows by one as it
 * is done.  A run passes through the steps of one batch size, ended by a step that nobody takes.  Numbers only grow, so a
 * lane that comes late finds everything taken, whatever has happened meanwhile. */
typedef struct share {
  _Alignas(128) _Atomic uint64_t done;  /* number << STATUS_BITS | status; END makes the helpers end */
  _Alignas(128) _Atomic uint64_t taken; /* (number << PIECE_BITS | from the front) << PIECE_BITS | from the back */
  _Atomic uint64_t finished;            /* (number << PIECE_BITS | pieces) << STATUS_BITS | status */
} share;

typedef struct lane {
  _Alignas(128) cnnc_rt_pool *pool;
  void *scratch;
  pthread_t thread;
  int index;
  uint64_t called; /* number of the kernel it did slices of last */
  int32_t last;    /* the last of them */
  bool impatient;  /* did some of another lane's share the last time */
} lane;

/* Odd while a lane sleeps, or is about to. */
typedef struct bell {
  _Alignas(128) _Atomic uint32_t word;
} bell;

struct cnnc_rt_pool {
  _Alignas(128) const cnnc_rt_bases *bases; /* of the run; a helper may look while it has taken a piece */
  uint64_t runs;
  int64_t patience_ns;
  int count;
  lane *lanes;
  bell bell;
  /* number << STATUS_BITS of the kernel that a timed run's clock runs for: else helpers may have done all of the next one
   * before the caller looks at the clock.  END where nobody looks. */
  _Alignas(128) _Atomic uint64_t begun;
  share shares[];
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

static bool reached(_Atomic uint64_t *done, uint64_t number) { return atomic_load(done) >= number << STATUS_BITS; }

static bool watch(_Atomic uint64_t *done, uint64_t number) {
  for (int i = 0; i < LOOKS; i++) {
    if (reached(done, number)) {
      return true;
    }
    _mm_pause();
  }
  return false;
}

static bool spin(_Atomic uint64_t *done, uint64_t number, int64_t patience_ns) {
  if (watch(done, number)) {
    return true;
  }
  int64_t start = cnnc_rt_clock();
  for (int64_t spent = 0; spent < patience_ns; spent = cnnc_rt_clock() - start) {
    if (spent > SPIN_NS) {
      sched_yield();
    }
    if (watch(done, number)) {
      return true;
    }
  }
  return false;
}

static void await(cnnc_rt_pool *pool, _Atomic uint64_t *done, uint64_t number) {
  if (spin(done, number, pool->patience_ns)) {
    return;
  }
  for (;;) {
    /* Once the word is odd, what is posted is either seen here, or its lane sees that the word is odd. */
    uint32_t word = atomic_fetch_or(&pool->bell.word, 1) | 1;
    if (reached(done, number)) {
      return;
    }
    syscall(SYS_futex, &pool->bell.word, FUTEX_WAIT_PRIVATE, word, NULL, NULL, 0);
  }
}

static void post(cnnc_rt_pool *pool, _Atomic uint64_t *watched, uint64_t value) {
  atomic_store(watched, value);
  uint32_t word = atomic_load(&pool->bell.word);
  if ((word & 1) != 0 && atomic_compare_exchange_strong(&pool->bell.word, &word, word + 1)) {
    syscall(SYS_futex, &pool->bell.word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
  }
}

static int count_shares(const cnnc_rt_pool *pool, const cnnc_rt_step *step) {
  return step->slices < pool->count ? step->slices : pool->count;
}

static int32_t bound(int32_t slices, int parts, int index) { return (int32_t)((int64_t)slices * index / parts); }

static int32_t share_size(const cnnc_rt_step *step, int shares, int index) {
  return bound(step->slices, shares, index + 1) - bound(step->slices, shares, index);
}

static int count_pieces(const cnnc_rt_step *step, int shares, int index) {
  int32_t size = share_size(step, shares, index);
  return size < MOST_PIECES ? size : MOST_PIECES;
}

static uint64_t call(lane *self, const cnnc_rt_step *step, uint64_t number, int32_t lo, int32_t hi) {
  int32_t last = self->called == number ? self->last : -1;
  int32_t status = step->thunk(self->pool->bases, self->scratch, last, lo, hi);
  self->called = number;
  self->last = hi - 1;
  return status == 0 ? GOOD : status > 0 ? BAD_VALUE : BUG;
}

static uint64_t call_piece(lane *self, const cnnc_rt_step *step, uint64_t number, int shares, int index, int piece) {
  int32_t first = bound(step->slices, shares, index);
  int32_t size = share_size(step, shares, index);
  int pieces = count_pieces(step, shares, index);
  return call(self, step, number, first + bound(size, pieces, piece), first + bound(size, pieces, piece + 1));
}

/* Takes the next piece of a share, from its front or its back; -1 if there is none. */
static int take(share *from, uint64_t number, int pieces, bool front) {
  uint64_t last = atomic_load(&from->taken);
  for (;;) {
    uint64_t of = last >> (2 * PIECE_BITS);
    uint64_t now = of == number ? last : number << (2 * PIECE_BITS);
    int before = (int)(now >> PIECE_BITS & PIECES);
    int after = (int)(now & PIECES);
    if (of > number || before + after >= pieces) {
      return -1;
    }
    if (atomic_compare_exchange_weak(&from->taken, &last, now + (front ? 1 << PIECE_BITS : 1))) {
      return front ? before : pieces - 1 - after;
    }
  }
}

/* Says that some pieces of a share are done; who does the last one says so of the share. */
static void finish(cnnc_rt_pool *pool, int index, uint64_t number, int count, int pieces, uint64_t status) {
  share *of = &pool->shares[index];
  if (count < pieces) {
    uint64_t last = atomic_load(&of->finished);
    uint64_t now;
    do {
      now = last >> (PIECE_BITS + STATUS_BITS) == number ? last : number << (PIECE_BITS + STATUS_BITS);
      now = (now + ((uint64_t)count << STATUS_BITS)) | status;
    } while (!atomic_compare_exchange_weak(&of->finished, &last, now));
    if ((int)(now >> STATUS_BITS & PIECES) < pieces) {
      return;
    }
    status = now & (BAD_VALUE | BUG);
  }
  post(pool, &of->done, number << STATUS_BITS | status);
}

/* Does what is left of a share; after a failure only hands the status on, so that it reaches the end of the run. */
static bool do_pieces(lane *self, const cnnc_rt_step *step, uint64_t number, int shares, int index, uint64_t status) {
  share *from = &self->pool->shares[index];
  int pieces = count_pieces(step, shares, index);
  int count = 0;
  for (int piece; (piece = take(from, number, pieces, index == self->index)) >= 0; count++) {
    if (status == GOOD) {
      status = call_piece(self, step, number, shares, index, piece);
    }
  }
  if (count > 0) {
    finish(self->pool, index, number, count, pieces, status);
  }
  return count > 0;
}

static void work(lane *self, const cnnc_rt_step *step, uint64_t number, int shares, uint64_t status) {
  if (self->index < shares) {
    do_pieces(self, step, number, shares, self->index, status);
  }
  for (int i = 1; i <= shares; i++) {
    int index = (self->index + i) % shares;
    /* A look at `taken` costs its owner a cache miss, so the owner is given a moment; unless it was late before. */
    if (index == self->index || (!self->impatient && watch(&self->pool->shares[index].done, number))) {
      continue;
    }
    self->impatient = do_pieces(self, step, number, shares, index, status);
  }
}

/* Waits until all shares of a kernel are done; returns what went wrong in any. */
static uint64_t join(cnnc_rt_pool *pool, uint64_t number, int shares) {
  uint64_t status = GOOD;
  for (int i = 0; i < shares; i++) {
    await(pool, &pool->shares[i].done, number);
    status |= atomic_load(&pool->shares[i].done) & (BAD_VALUE | BUG);
  }
  return status;
}

int32_t cnnc_rt_pool_run(cnnc_rt_pool *pool, const cnnc_rt_variant *variant, const cnnc_rt_bases *bases,
                         cnnc_rt_counter *counters, bool alone) {
  const int32_t end = variant->first_step + variant->kernel_count;
  lane *self = &pool->lanes[0];
  uint64_t number = ++pool->runs * (uint64_t)cnnc_rt_the_model.step_count + (uint64_t)variant->first_step;
  uint64_t status = GOOD;
  bool posted = false;
  int64_t before = counters != NULL ? cnnc_rt_clock() : 0;
  pool->bases = bases;
  if (counters != NULL || atomic_load(&pool->begun) != END) {
    post(pool, &pool->begun, counters != NULL ? number << STATUS_BITS : END);
  }
  for (int32_t k = variant->first_step; k < end; k++, number++) {
    const cnnc_rt_step *step = &cnnc_rt_the_model.steps[k];
    int shares = alone ? 1 : count_shares(pool, step);
    if (shares > 1) {
      if (!posted) {
        post(pool, &pool->shares[0].done, number << STATUS_BITS | status);
      }
      if (counters != NULL) {
        post(pool, &pool->begun, (number + 1) << STATUS_BITS);
      }
      work(self, step, number + 1, shares, status);
      status = join(pool, number + 1, shares);
    } else if (status == GOOD) {
      status = call(self, step, number + 1, 0, step->slices);
    }
    posted = shares > 1;
    if (counters != NULL) {
      int64_t now = cnnc_rt_clock();
      counters[k].ns += (uint64_t)(now - before);
      counters[k].calls++;
      before = now;
    }
  }
  return status == GOOD ? 0 : status == BAD_VALUE ? 1 : -1;
}

static void *help(void *argument) {
  lane *self = argument;
  cnnc_rt_pool *pool = self->pool;
  const uint64_t steps = (uint64_t)cnnc_rt_the_model.step_count;
  uint64_t number = 0;
  _mm_setcsr(CNNC_RT_MXCSR);
  for (;;) {
    await(pool, &pool->shares[0].done, number + 1);
    uint64_t done = atomic_load(&pool->shares[0].done);
    if (done == END) {
      return NULL;
    }
    number = done >> STATUS_BITS;
    uint64_t k = number % steps;
    const cnnc_rt_step *step = &cnnc_rt_the_model.steps[k];
    if (count_shares(pool, step) > 1) {
      /* Before the first kernel of a batch size is the end of another, of one share: that which opened the run. */
      uint64_t status = join(pool, number, k == 0 ? 1 : count_shares(pool, step - 1));
      await(pool, &pool->begun, number + 1);
      work(self, step, number + 1, count_shares(pool, step), status);
    }
  }
}

static void stop(cnnc_rt_pool *pool, int started) {
  post(pool, &pool->shares[0].done, END);
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
         pthread_create(&pool->lanes[started].thread, &attributes, help, &pool->lanes[started]) == 0) {
    started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return started;
}

int cnnc_rt_pool_create(int threads, char *scratch, size_t scratch_stride, cnnc_rt_pool **out) {
  size_t size = sizeof(cnnc_rt_pool) + (size_t)threads * (sizeof(share) + sizeof(lane));
  cnnc_rt_pool *pool = aligned_alloc(128, size);
  if (pool == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  memset(pool, 0, size);
  pool->count = threads;
  pool->begun = END;
  pool->patience_ns = threads <= cnnc_rt_allowed_cpus() ? PATIENCE_NS : 0;
  pool->lanes = (lane *)(void *)(pool->shares + threads);
  for (int i = 0; i < threads; i++) {
    pool->lanes[i].pool = pool;
    pool->lanes[i].index = i;
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
  /* In the child of a fork the helpers do not exist. */
  if (!forked) {
    stop(pool, pool->count);
  }
  free(pool);
}
