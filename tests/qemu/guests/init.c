/* SPDX-License-Identifier: MIT */
/*
 * init of a guest that runs a stock Linux kernel: writes a word into each of its pages, round after
 * round, checks all of them before it does, and says the round on the console, as the other guests
 * do.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mount.h>
#include <unistd.h>

#define PAGES	   2000u
#define PAGE_WORDS 512u
#define ROUND_US   20000u

int main(void)
{
	static uint64_t memory[PAGES * PAGE_WORDS];
	int fd;

	mount("dev", "/dev", "devtmpfs", 0, NULL);
	fd = open("/dev/ttyS0", O_WRONLY);
	if (fd < 0)
		return 1;
	for (uint32_t round = 1;; round++) {
		char wrong = 'n';

		for (uint32_t i = 0; i < PAGES; i++) {
			if (memory[i * PAGE_WORDS] != round - 1)
				wrong = 'E';
			memory[i * PAGE_WORDS] = round;
		}
		dprintf(fd, "%c %08x\n", wrong, round);
		usleep(ROUND_US);
	}
}
