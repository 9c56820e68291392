/* SPDX-License-Identifier: MIT */
/*
 * image: a synthetic guest's memory and its versions, the same bytes on every machine:
 * a page's content is a function of the seed, its number, and the epochs that changed it.
 *
 * Version 0, in runs of 1 to 64 pages: 40 % zero; 30 % "file data", runs of a pool of
 * 8192 pages of text and code (1 GiB holds each about nine times); 15 % "heap" (pointers,
 * small numbers, zeroes, short ASCII: compresses well); 15 % random bytes.
 * An epoch changes 1 % of the pages, at random: 60 % get 1 to 4 new pieces of 64 to 512
 * bytes, 20 % are new heap, 10 % random, 5 % file data, 5 % zero.
 *
 * Known fingerprints, 1 GiB, seed 1: version 0 1b47a36fc85ba672, version 1
 * d65b425982633a20, version 50 68e4055fbce9857e.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define IMAGE_PAGE 4096u

/* Write version 0 to ram: nr_pages, at most 2^32. */
void image_base(uint8_t *ram, uint32_t nr_pages, uint64_t seed);
/* Turn version epoch - 1 into version epoch; returns the pages changed, ascending,
 * malloc()ed, *nr of them. */
uint32_t *image_epoch(uint8_t *ram, uint32_t nr_pages, uint64_t seed, uint32_t epoch, uint32_t *nr);
uint64_t image_fingerprint(const uint8_t *ram, uint32_t nr_pages);
