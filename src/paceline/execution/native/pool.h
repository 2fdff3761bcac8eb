/* A few threads that meet at barriers: every worker runs the whole pass over its share of each step. */
#ifndef PACELINE_POOL_H
#define PACELINE_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* A clock that is cheap to read. */
static uint64_t ticks(void) {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_ia32_rdtsc();
#else
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
#endif
}

typedef struct {
  int threads, stop;
  atomic_int arrived, phase, job, sleeping;
  pthread_mutex_t lock;
  pthread_cond_t wake;
} Pool;

/* Wait until *word differs from `old`: spin, then offer the core to others, then sleep.
 *
 * Offering comes before sleeping because two threads that wake each other in turn stay on one core for seconds: the scheduler
 * sees one of them runnable at a time. Two runnable ones it moves apart. */
static void await(Pool *p, atomic_int *word, int old, int spins, int offers) {
  for (int i = 0; i < spins + offers; i++) {
    if (atomic_load(word) != old) return;
    if (i >= spins) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
  }
  pthread_mutex_lock(&p->lock);
  atomic_fetch_add(&p->sleeping, 1);
  while (atomic_load(word) == old) pthread_cond_wait(&p->wake, &p->lock);
  atomic_fetch_sub(&p->sleeping, 1);
  pthread_mutex_unlock(&p->lock);
}

/* Advance *word and wake whoever sleeps on it. A waiter counts itself before it looks again, so none is missed. */
static void announce(Pool *p, atomic_int *word) {
  atomic_fetch_add(word, 1);
  if (!atomic_load(&p->sleeping)) return;
  pthread_mutex_lock(&p->lock);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
}

static void meet(Pool *p) {
  if (p->threads == 1) return;
  int phase = atomic_load(&p->phase);
  if (atomic_fetch_add(&p->arrived, 1) == p->threads - 1) {
    atomic_store(&p->arrived, 0);
    announce(p, &p->phase);
  } else {
    await(p, &p->phase, phase, 2000, 20000);
  }
}

#endif
