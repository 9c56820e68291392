/* SPDX-License-Identifier: MIT */
/*
 * stream: a bounded ring of bytes between the control thread (the client's side)
 * and a job thread.  The job's side waits; the client's side never does: it takes
 * or gives what is possible, and asks with stream_client_ready() when there may be
 * more.  Data flows one way.  Each side has a reference; when one side lets go the
 * other learns it: a reader gets what is there, then -EPIPE; a job that writes
 * gets -EPIPE, a client that writes may go on, and its bytes are dropped: a client
 * that is cut off while it sends would never see the reason.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct daemon;
struct job;
struct stream;

enum stream_side { STREAM_CLIENT, STREAM_JOB };

/* Two references, one for each side.  `d` is woken for the client's side. */
int stream_create(struct daemon *d, struct stream **ret);
void stream_unref(struct stream *s, enum stream_side side); /* accepts NULL */
/* The writer: no more comes.  Without it, letting go means: cut off. */
void stream_end(struct stream *s);

/* Job's side; wait.  read: exactly `len` bytes, or -EPIPE when the client was cut
 * off, -ENODATA when it ended before.  write: all, or -EPIPE.  Both: -ECANCELED. */
int stream_job_read(struct stream *s, struct job *job, void *dst, size_t len);
int stream_job_write(struct stream *s, struct job *job, const void *src, size_t len);

/* Client's side; never wait.  How many bytes; read: 0 none now, -1 the end, -2 cut off. */
size_t stream_client_write(struct stream *s, const void *src, size_t len);
long stream_client_read(struct stream *s, void *dst, size_t len);
bool stream_client_ready(struct stream *s);
