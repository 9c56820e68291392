/* SPDX-License-Identifier: MIT */
/* What simdisk's parts share. */
#pragma once

#include <sys/types.h>

#include "tests/lib/simdisk.h"

/* ---- simdisk.c: nothing is noted unless a recording is on ---- */
bool sim_recording(void);
bool sim_is_recorded(int fd);
bool sim_may_map(int fd); /* shared and writable */
uint64_t sim_clock(void);
int sim_open(int at, const char *path, int flags, mode_t mode);
void sim_note_close(int fd);
void sim_note_write(int fd, uint64_t offset, const void *data, size_t len);
/* A write that takes time: 0, or a number for its end, of which `len` was written. */
size_t sim_begin_write(int fd, uint64_t offset, const void *data, size_t len);
void sim_end_write(size_t op, size_t len);
void sim_note_sync(int fd, uint64_t began, bool from_ring);
void sim_note_lost(int fd);
void sim_note_size(int fd, uint64_t size);
void sim_note_mkdir(int at, const char *path);
void sim_note_unlink(int at, const char *path);
void sim_note_rename(int from_at, const char *from, int to_at, const char *to);

/* ---- simfail.c ---- */
/* 0, or the errno to fail with; *len may become shorter. */
int sim_may_fail(const char *what, bool writes, size_t *len);
/* The write that sim_may_fail() has just failed reaches the file all the same. */
bool sim_done_all_the_same(void);
bool sim_no_memory(const char *what);
