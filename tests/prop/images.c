/* SPDX-License-Identifier: MIT */
/* Copies of guest memory made from dirty sets; images.h tells. */
#include "tests/prop/images.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "tests/lib/check.h"

void missed(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("missed: ");
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
	fflush(stdout);
	exit(EXIT_MISSED);
}

static bool overlap(uint64_t a, uint64_t nr_a, uint64_t b, uint64_t nr_b)
{
	return a < b + nr_b && b < a + nr_a;
}

static void piece_check(const struct live_pieces *l, const struct snapd_piece *p, ino_t ino)
{
	for (uint32_t i = 0; i < l->nr; i++) {
		const struct live_piece *o = &l->p[i];

		if (!o->told)
			continue; /* gone, perhaps, while nobody was connected */
		if (overlap(o->p.home_gfn, o->p.nr_frames, p->home_gfn, p->nr_frames))
			missed("two pages have the key 0x%llx", (unsigned long long)p->home_gfn);
		if (o->ino == ino &&
		    overlap(o->p.block_page, o->p.nr_frames, p->block_page, p->nr_frames))
			missed("one page is stored twice, at 0x%llx and 0x%llx",
			       (unsigned long long)o->p.home_gfn, (unsigned long long)p->home_gfn);
	}
}

/* Known from an earlier connection? */
static bool retold(struct live_pieces *l, const struct snapd_piece *p, ino_t ino)
{
	for (uint32_t i = 0; i < l->nr; i++) {
		struct live_piece *o = &l->p[i];

		if (o->told || o->p.first_frame != p->first_frame)
			continue;
		check(o->ino == ino && o->p.home_gfn == p->home_gfn &&
			      o->p.nr_frames == p->nr_frames && o->p.block_page == p->block_page,
		      "a piece is another one after a reconnect");
		o->p = *p;
		o->told = true;
		return true;
	}
	return false;
}

static void piece_add(struct live_pieces *l, struct fake_service *s, const struct snapd_piece *p)
{
	int fd = s->block_fds[p->block];
	struct live_piece *n = &l->p[l->nr];
	struct stat st;

	check(!fstat(fd, &st), "fstat");
	if (retold(l, p, st.st_ino))
		return;
	piece_check(l, p, st.st_ino);
	check(l->nr < IMAGE_PARTS, "many pieces");
	*n = (struct live_piece){.p = *p, .ino = st.st_ino, .told = true};
	n->map = mmap(NULL, p->nr_frames * FAKE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		      (off_t)(p->block_page * FAKE_PAGE));
	check(n->map != MAP_FAILED, "mmap");
	for (uint64_t f = 0; f < p->nr_frames; f++)
		if (!gpaset_test(&s->dirty, p->first_frame + f))
			missed("a new piece is not dirty");
	l->nr++;
}

static void piece_drop(struct live_pieces *l, uint32_t i)
{
	munmap(l->p[i].map, l->p[i].p.nr_frames * FAKE_PAGE);
	l->p[i] = l->p[--l->nr];
}

static void gone_check(const struct fake_service *s, const struct snapd_piece *p)
{
	for (uint64_t f = 0; f < p->nr_frames; f++)
		if (gpaset_test(&s->dirty, p->first_frame + f))
			missed("a piece that is gone left its bits in the set");
}

/* Pieces that ended and pieces that came, in the order in which their keys were free. */
bool live_update(struct live_pieces *l, struct fake_service *s)
{
	bool ended = false;

	for (uint32_t i = 0; i < l->nr;) {
		if (!l->p[i].told || !s->gone[l->p[i].p.piece]) {
			i++;
			continue;
		}
		gone_check(s, &l->p[i].p);
		piece_drop(l, i);
		ended = true;
	}
	for (; l->seen < s->nr_pieces; l->seen++)
		if (!s->gone[l->seen])
			piece_add(l, s, &s->pieces[l->seen]);
	return ended;
}

void live_reconnected(struct live_pieces *l)
{
	for (uint32_t i = 0; i < l->nr; i++)
		l->p[i].told = false;
	l->seen = 0;
}

bool live_settle(struct live_pieces *l)
{
	bool ended = false;

	for (uint32_t i = 0; i < l->nr;) {
		if (l->p[i].told) {
			i++;
			continue;
		}
		piece_drop(l, i);
		ended = true;
	}
	return ended;
}

void live_deinit(struct live_pieces *l)
{
	while (l->nr)
		piece_drop(l, 0);
}

uint8_t *live_page(const struct live_pieces *l, uint64_t gfn)
{
	for (uint32_t i = 0; i < l->nr; i++)
		if (gfn - l->p[i].p.home_gfn < l->p[i].p.nr_frames)
			return l->p[i].map + (gfn - l->p[i].p.home_gfn) * FAKE_PAGE;
	return NULL;
}

const struct live_piece *live_by_frame(const struct live_pieces *l, uint64_t frame)
{
	for (uint32_t i = 0; i < l->nr; i++)
		if (frame - l->p[i].p.first_frame < l->p[i].p.nr_frames)
			return &l->p[i];
	return NULL;
}

/* ---- images ---- */

static struct image_part *part_of(const struct image *im, uint64_t gfn)
{
	for (uint32_t i = 0; i < im->nr; i++)
		if (gfn - im->part[i].home_gfn < im->part[i].nr)
			return (struct image_part *)&im->part[i];
	return NULL;
}

static bool is_live(const struct live_pieces *l, const struct image_part *part)
{
	for (uint32_t i = 0; i < l->nr; i++)
		if (l->p[i].p.home_gfn == part->home_gfn && l->p[i].p.nr_frames == part->nr)
			return true;
	return false;
}

static void part_add(struct image *im, uint64_t home_gfn, uint64_t nr)
{
	struct image_part *part = &im->part[im->nr++];

	*part = (struct image_part){home_gfn, nr, calloc(nr, FAKE_PAGE)};
	check(part->bytes, "memory");
}

void image_fit(struct image *im, const struct live_pieces *l)
{
	for (uint32_t i = 0; i < im->nr;) {
		if (is_live(l, &im->part[i])) {
			i++;
			continue;
		}
		free(im->part[i].bytes);
		im->part[i] = im->part[--im->nr];
	}
	for (uint32_t i = 0; i < l->nr; i++)
		if (!part_of(im, l->p[i].p.home_gfn))
			part_add(im, l->p[i].p.home_gfn, l->p[i].p.nr_frames);
}

bool image_copy(struct image *im, uint64_t gfn, const uint8_t *from)
{
	struct image_part *part = part_of(im, gfn);
	uint8_t *to = part->bytes + (gfn - part->home_gfn) * FAKE_PAGE;

	if (!memcmp(to, from, FAKE_PAGE))
		return false;
	memcpy(to, from, FAKE_PAGE);
	return true;
}

void image_check(const struct image *im, const struct live_pieces *l, const char *whose)
{
	for (uint32_t i = 0; i < im->nr; i++) {
		const struct image_part *part = &im->part[i];
		const uint8_t *page = live_page(l, part->home_gfn);

		for (uint64_t k = 0; page && k < part->nr; k++, page += FAKE_PAGE)
			if (memcmp(part->bytes + k * FAKE_PAGE, page, FAKE_PAGE))
				missed("%s: page 0x%llx", whose,
				       (unsigned long long)(part->home_gfn + k));
	}
}

void image_clone(struct image *to, const struct image *from)
{
	image_deinit(to);
	for (uint32_t i = 0; i < from->nr; i++) {
		part_add(to, from->part[i].home_gfn, from->part[i].nr);
		memcpy(to->part[i].bytes, from->part[i].bytes, from->part[i].nr * FAKE_PAGE);
	}
}

bool image_has(const struct image *im, uint64_t gfn, uint64_t nr)
{
	const struct image_part *part = part_of(im, gfn);

	return part && part->home_gfn == gfn && part->nr == nr;
}

void image_write(const struct image *im, const struct live_pieces *l)
{
	for (uint32_t i = 0; i < im->nr; i++) {
		uint8_t *page = live_page(l, im->part[i].home_gfn);

		check(page, "memory that the snapshot has is gone");
		memcpy(page, im->part[i].bytes, im->part[i].nr * FAKE_PAGE);
	}
}

void image_deinit(struct image *im)
{
	while (im->nr)
		free(im->part[--im->nr].bytes);
}
