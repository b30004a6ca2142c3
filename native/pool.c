/* Threads, and memory that they keep. Where torch has a GNU OpenMP loaded, its threads do the work: they spin for a while after each
   product of torch's, and threads of our own would have to share the cores with them. Elsewhere, and in a child after a fork, which
   OpenMP's threads do not survive, a pool of our own waits for work: any number of callers may have work under way, and each takes
   part in its own and needs no thread of the pool to end. */
#include "kernel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST_THREADS = 256, SPINS = 4000 };

typedef struct work {
    void (*function)(const void *, int64_t);
    const void *context;
    int64_t units, helpers_wanted;
    int64_t helpers; /* under the lock: threads of the pool that hold a pointer to this */
    atomic_int_fast64_t next;
    struct work *following;
} work;

typedef void parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static parallel *of_torch; /* GOMP_parallel */
static atomic_int forked;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static work *first;              /* under the lock: work that wants more helpers */
static int64_t threads_started;  /* under the lock */
static atomic_int waiting;       /* how much work wants helpers: read without the lock by threads that spin */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;

typedef struct { void *memory; int64_t bytes; } kept;

static void release(void *pointer) {
    kept *mine = pointer;
    free(mine->memory);
    free(mine);
}

/* Only the thread that forks lives on in the child. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&lock); }
static void after_fork_in_child(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wanted, NULL);
    pthread_cond_init(&left, NULL);
    first = NULL;
    threads_started = 0;
    atomic_store(&waiting, 0);
    atomic_store(&forked, 1);
}

static void set_up(void) {
    pthread_key_create(&key, release);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

void *scratch(int64_t bytes) {
    pthread_once(&once, set_up);
    kept *mine = pthread_getspecific(key);
    if (!mine) {
        if (!(mine = calloc(1, sizeof *mine))) return NULL;
        pthread_setspecific(key, mine);
    }
    if (mine->bytes < bytes) {
        free(mine->memory);
        mine->bytes = 0;
        mine->memory = NULL;
        if (posix_memalign(&mine->memory, 64, (size_t)divide_up(bytes, 4096) * 4096)) return NULL;
        mine->bytes = divide_up(bytes, 4096) * 4096;
    }
    return mine->memory;
}

static void take_part(work *w) {
    for (;;) {
        int64_t unit = atomic_fetch_add(&w->next, 1);
        if (unit >= w->units) return;
        w->function(w->context, unit);
    }
}

/* Under the lock: the first work takes one helper, and leaves the list when it has enough. */
static work *join_first(void) {
    work *w = first;
    w->helpers++;
    if (--w->helpers_wanted == 0) {
        first = w->following;
        atomic_fetch_sub(&waiting, 1);
    }
    return w;
}

static void *helper(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        if (!first) {
            pthread_mutex_unlock(&lock);
            /* The next matrix of a model comes within microseconds; waking up takes tens of them. */
            for (int i = 0; i < SPINS && !atomic_load_explicit(&waiting, memory_order_relaxed); i++) {
#if defined(__x86_64__) || defined(__i386__)
                __builtin_ia32_pause();
#endif
            }
            pthread_mutex_lock(&lock);
            while (!first) pthread_cond_wait(&wanted, &lock);
        }
        work *w = join_first();
        pthread_mutex_unlock(&lock);
        take_part(w);
        pthread_mutex_lock(&lock);
        if (--w->helpers == 0) pthread_cond_broadcast(&left);
    }
    return NULL;
}

/* Told once, before anything is multiplied. */
EXPORT void secateur_use_threads(void *gomp_parallel) { of_torch = (parallel *)gomp_parallel; }

static void take_part_of_team(void *pointer) { take_part(pointer); }

void run_units(int64_t threads, int64_t units, void (*function)(const void *, int64_t), const void *context) {
    work mine = {.function = function, .context = context, .units = units};
    atomic_init(&mine.next, 0);
    mine.helpers_wanted = least(least(threads, units), MOST_THREADS) - 1;
    if (mine.helpers_wanted <= 0) {
        take_part(&mine);
        return;
    }
    pthread_once(&once, set_up);
    if (of_torch && !atomic_load(&forked)) {
        of_torch(take_part_of_team, &mine, (unsigned)mine.helpers_wanted + 1, 0);
        return;
    }
    pthread_mutex_lock(&lock);
    while (threads_started < mine.helpers_wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, NULL)) break; /* fewer threads do the same work */
        pthread_detach(thread);
        threads_started++;
    }
    mine.following = first;
    first = &mine;
    atomic_fetch_add(&waiting, 1);
    pthread_cond_broadcast(&wanted);
    pthread_mutex_unlock(&lock);
    take_part(&mine);
    pthread_mutex_lock(&lock);
    for (work **at = &first; *at; at = &(*at)->following)
        if (*at == &mine) { /* nobody came for some of it, and nobody is needed any more */
            *at = mine.following;
            atomic_fetch_sub(&waiting, 1);
            break;
        }
    while (mine.helpers) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}
