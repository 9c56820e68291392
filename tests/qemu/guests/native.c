/* SPDX-License-Identifier: MIT */
/*
 * native: a guest in 64-bit C at CPL 3, which KVM runs natively, with real dirty tracking.
 * Each vCPU writes pages of its own in random order: page number, count of writes, a word
 * derived from both somewhere in the page, and the count in a table.  What it finds in a
 * page is compared with the table first.  "n 0000002a" on the serial port now and then (vCPU 0;
 * vCPU 1: "m"), "E" when a page is not as the table has it.
 */
#include <stdint.h>

#define DATA	  0x400000ull /* pages; before it the tables, from 0x200000 on */
#define TABLE	  0x200000ull
#define PAGE	  4096ull
#define SAY_EVERY 0x200u

#define SCREEN 0xa0000ull /* as boot.S sets it */
#define PIXELS 16000u

extern uint32_t param_pages, param_pause, param_cpus, param_draw;

struct page {
	uint64_t number;
	uint64_t count;
	uint64_t words[510];
};

static void out(uint8_t c)
{
	__asm__ volatile("outb %0, %1" : : "a"(c), "Nd"((uint16_t)0x3f8));
}

/* 16 pixels, as serial.inc draws them. */
static void draw(uint32_t n)
{
	uint32_t colour = n * 0x9e3779b1u;
	volatile uint32_t *at = (volatile uint32_t *)SCREEN + (colour >> 8) % (PIXELS - 16);

	for (int i = 0; i < 16; i++)
		at[i] = colour;
}

static int line_lock;

static void say(uint8_t name, uint32_t n)
{
	while (__atomic_exchange_n(&line_lock, 1, __ATOMIC_ACQUIRE))
		__asm__ volatile("pause");
	out(name);
	out(' ');
	for (int shift = 28; shift >= 0; shift -= 4)
		out((uint8_t) "0123456789abcdef"[n >> shift & 15]);
	out('\n');
	if (param_draw)
		draw(n);
	__atomic_store_n(&line_lock, 0, __ATOMIC_RELEASE);
}

static void wait(uint32_t rounds)
{
	for (uint32_t i = 0; i < rounds; i++)
		__asm__ volatile("pause");
}

static void step(uint64_t number)
{
	volatile struct page *p = (volatile struct page *)(DATA + number * PAGE);
	volatile uint64_t *table = (volatile uint64_t *)TABLE;
	uint64_t count = table[number];

	if (p->number != (count ? number : 0) || p->count != count ||
	    (count && p->words[(number + count) % 510] != number * 1000003 + count)) {
		say('E', (uint32_t)number);
		for (;;)
			wait(1);
	}
	count++;
	p->number = number;
	p->count = count;
	p->words[(number + count) % 510] = number * 1000003 + count;
	table[number] = count;
}

void native_main(uint64_t cpu);
void native_main(uint64_t cpu)
{
	uint64_t rng = 0x9e3779b97f4a7c15ull + cpu;
	uint32_t per_cpu = param_pages / param_cpus;

	for (uint32_t i = 1;; i++) {
		rng ^= rng << 13;
		rng ^= rng >> 7;
		rng ^= rng << 17;
		step(rng % per_cpu * param_cpus + cpu);
		if (i % SAY_EVERY == 0)
			say(cpu ? 'm' : 'n', i / SAY_EVERY);
		wait(param_pause);
	}
}
