/* SPDX-License-Identifier: MIT */
/*
 * fake_service: a socket on which the test itself speaks the service's side of the
 * protocol to an agent.
 *
 * Every call ends the test when something is not as it must be.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/agent.h"
#include "snapd/gpaset.h"
#include "snapd/protocol.h"

/* A directory and a socket in it; the listening descriptor. */
int fake_listen(char *dir, size_t dir_bytes, char *socket_path, size_t socket_bytes);
void fake_unlisten(int listen_fd, const char *dir, const char *socket_path);

#ifndef FAKE_PAGE
#define FAKE_PAGE 4096ull /* the host's */
#endif
#define FAKE_PIECES 256
#define FAKE_BLOCKS 256
struct fake_service {
	int fd;
	struct snapd_msg_hello hello;
	int shm_fd;
	struct snapd_shm *shm;
	struct gpaset dirty, inflight;
	uint32_t nr_blocks, nr_pieces;
	int block_fds[FAKE_BLOCKS];
	struct snapd_piece pieces[FAKE_PIECES];
	bool gone[FAKE_PIECES];
	uint32_t ready_vcpus;
	struct snapd_msg_about about; /* the last of them */
	uint32_t nr_abouts;
	bool said_bye;
	uint64_t req;
	union {
		struct snapd_msg h;
		struct snapd_msg_synced synced;
		struct snapd_msg_paused paused;
		struct snapd_msg_loaded loaded;
		struct snapd_msg_resumed resumed;
		struct snapd_msg_error error;
		uint8_t bytes[SNAPD_MSG_MAX];
	} in;
	int in_fd;
};

/* Accept, read HELLO; no answer yet. */
void fake_accept_on(int listen_fd, struct fake_service *s);
void fake_welcome(struct fake_service *s);
void fake_until_ready(struct fake_service *s);		  /* blocks and pieces, to READY */
void fake_open_on(int listen_fd, struct fake_service *s); /* all three */
void fake_close(struct fake_service *s);
/* Send; `msg` starts with struct snapd_msg; len and req are filled in. */
void fake_send(struct fake_service *s, void *msg, size_t len, uint16_t type, int fd);
/* The next answer, blocks and pieces taken in on the way; its type. */
uint16_t fake_answer(struct fake_service *s);
bool fake_is_closed(struct fake_service *s); /* waits for the agent to hang up */
/* What the service copied of RAM, and its own mapping, by block. */
struct fake_copy {
	uint8_t *ram[FAKE_BLOCKS], *map[FAKE_BLOCKS];
	uint64_t size[FAKE_BLOCKS];
	uint32_t nr;
};
void fake_copy_init(struct fake_copy *c, const struct fake_service *s);
void fake_copy_deinit(struct fake_copy *c);
/* Copy what is dirty, and take it out of the set; how many frames. */
uint64_t fake_copy_dirty(struct fake_service *s, struct fake_copy *c);
/* The copy equals RAM, or the test ends. */
void fake_copy_check(const struct fake_copy *c, const char *when);
/* Requests that must succeed. */
void fake_sync(struct fake_service *s);
int fake_pause(struct fake_service *s, uint32_t flags); /* the state's descriptor */
void fake_rewrite(struct fake_service *s, struct snapd_point to);
void fake_pause_to_rewrite(struct fake_service *s, struct snapd_point to); /* no state */
void fake_load_resume(struct fake_service *s, int state_fd, uint64_t len);
uint16_t fake_resume_untouched(struct fake_service *s); /* type of the answer */
void fake_load(struct fake_service *s, int state_fd, uint64_t len);
void fake_resume(struct fake_service *s);
