/* SPDX-License-Identifier: MIT */
/*
 * slow_file: a file whose reads end when the test says so.  An O_DIRECT read of it pins
 * the reader's pages, as a disk's driver does, and holds them until then.
 *
 * A FUSE mount of one file, in a mount namespace of the test's own.  A process of its
 * own serves it and dies with the test: else a test that ends while a read waits would
 * wait for itself.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Shared with the process that serves. */
struct slow_reads {
	_Atomic bool is_held; /* reads wait */
	_Atomic uint32_t nr_waiting;
	_Atomic uint8_t fill; /* every byte read */
};

struct slow_file {
	int fd; /* open O_DIRECT, for reading */
	struct slow_reads *reads;
	char path[64];
	pid_t server;
};

/* 0, or -errno where such a mount is not possible.  Before the test has threads. */
int slow_file_open(struct slow_file *f);
void slow_file_close(struct slow_file *f);
