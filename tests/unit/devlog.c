/* SPDX-License-Identifier: MIT */
/*
 * A device log is taken by atomic exchange: no bit that a device sets is lost, whenever
 * it is set.
 *
 * Method: the device logs a page only when its last bit was reported; so a bit that is
 * lost leaves its page silent for ever.  All pages lie in one word, which the collector
 * takes as fast as it can.  Built once more with the exchange taken away, the test has to
 * see silent pages.
 *
 * Also: layout (bit n % 8 of byte n / 8), bits beyond the memory, the ends of the log.
 */
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/util/ablation.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/sim_vm.h"

#define PAGES  64u
#define WRITES 5000u
#define ROUNDS 100000u

#ifdef SNAPD_ABLATIONS
enum ablation snapd_ablation = ABLATION_LOG_NOT_EXCHANGED;
#define EXPECT_LOSS 1
#else
#define EXPECT_LOSS 0
#endif

static struct snapd_devlog_mem mem;
static _Atomic uint64_t written[PAGES], reported[PAGES];
static _Atomic uint64_t total;
static _Atomic bool stop;

static void log_page(uint64_t page)
{
	__atomic_fetch_or((uint8_t *)mem.base + page / 8, (uint8_t)(1u << page % 8),
			  __ATOMIC_SEQ_CST);
}

static void *device(void *arg)
{
	while (!atomic_load(&stop))
		for (uint64_t p = 0; p < PAGES; p++)
			if (atomic_load(&written[p]) == atomic_load(&reported[p])) {
				atomic_fetch_add(&written[p], 1);
				log_page(p);
				atomic_fetch_add(&total, 1);
				sched_yield(); /* or both would go in step */
			}
	return NULL;
}

static void collect(struct snapd_consumer *c)
{
	uint64_t gfns[PAGES];
	long n = snapd_consumer_take(c, gfns, PAGES, 0);

	for (long i = 0; i < n; i++)
		atomic_store(&reported[gfns[i]], atomic_load(&written[gfns[i]]));
}

static uint32_t silent_pages(struct snapd_consumer *c)
{
	uint32_t silent = 0;
	pthread_t thread;

	check(!pthread_create(&thread, NULL, device, NULL), "thread");
	/* The device must have had its turns, too; a lossy log stops it, in the end. */
	for (uint32_t i = 0;
	     atomic_load(&total) < (i < ROUNDS ? WRITES : 4 * PAGES) && i < 10 * ROUNDS; i++) {
		collect(c);
		if (i % 64 == 0)
			sched_yield();
	}
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	collect(c);
	for (uint32_t p = 0; p < PAGES; p++)
		silent += atomic_load(&written[p]) != atomic_load(&reported[p]);
	return silent;
}

static void test_layout(struct sim_vm *vm, struct snapd_consumer *c)
{
	struct snapd_devlog_mem other_mem;
	struct snapd_devlog *other;
	uint64_t gfns[PAGES];

	check(mem.len_bytes >= PAGES / 8 && mem.fd >= 0, "log of %llu bytes",
	      (unsigned long long)mem.len_bytes);
	check(snapd_consumer_take(c, gfns, PAGES, 0) == 0, "clean");
	((uint8_t *)mem.base)[1] = 0x81;	 /* pages 8 and 15 */
	((uint8_t *)mem.base)[PAGES / 8] = 0xff; /* no memory there */
	check(snapd_consumer_take(c, gfns, PAGES, 0) == 2 && gfns[0] == 8 && gfns[1] == 15,
	      "pages 8 and 15");
	check(!((uint8_t *)mem.base)[1], "taken");
	check(snapd_devlog_create(vm->agent, 0, &other, &other_mem) < 0, "no log");
	check(snapd_devlog_create(vm->agent, 1ull << 53, &other, &other_mem) < 0, "too long");
	/* A log that ends before the memory does, and whose last bits count. */
	check(!snapd_devlog_create(vm->agent, 8 * FAKE_PAGE, &other, &other_mem), "second log");
	((uint8_t *)other_mem.base)[0] = 0x10;
	snapd_devlog_destroy(other);
	check(snapd_consumer_take(c, gfns, PAGES, 0) == 1 && gfns[0] == 4, "page 4");
	snapd_devlog_destroy(NULL);
}

int main(void)
{
	const struct sim_vm_config config = {.nr_vcpus = 1, .ring_entries = 256};
	struct snapd_memslot slot = {.size_bytes = PAGES * FAKE_PAGE};
	struct snapd_consumer *c;
	struct snapd_devlog *log;
	static struct sim_vm vm;
	uint64_t gfns[PAGES];
	uint32_t silent;

	slot.fd = memfd_create("ram", MFD_CLOEXEC);
	check(!ftruncate(slot.fd, PAGES * FAKE_PAGE), "memory");
	slot.hva = mmap(NULL, PAGES * FAKE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, slot.fd, 0);
	sim_vm_create(&vm, &config);
	check(!snapd_vm_memslot(vm.agent, &slot), "%s", snapd_vm_error(NULL));
	check(!snapd_devlog_create(vm.agent, 2 * PAGES * FAKE_PAGE, &log, &mem), "%s",
	      snapd_vm_error(NULL));
	check(!snapd_consumer_create(vm.agent, "c", &c), "consumer");
	check(snapd_consumer_take(c, gfns, PAGES, 0) == PAGES, "new");
	if (!EXPECT_LOSS)
		test_layout(&vm, c);
	silent = silent_pages(c);
	printf("%u of %u pages silent, %llu writes\n", silent, PAGES,
	       (unsigned long long)atomic_load(&total));
	check((silent > 0) == EXPECT_LOSS, "%u pages silent", silent);
	snapd_consumer_destroy(c);
	snapd_devlog_destroy(log);
	sim_vm_destroy(&vm);
	munmap(slot.hva, PAGES * FAKE_PAGE);
	close(slot.fd);
	return 0;
}
