/* SPDX-License-Identifier: MIT */
/*
 * api_priv: what api/http.c (socket, connections, running MHD) and api/request.c
 * (the life of a request) share.  Control thread.
 */
#pragma once

#include "snapd/api/request.h"

struct conn {
	uid_t uid;
	int fd;	     /* MHD's */
	bool nudged; /* see sweep() */
	struct conn *next, **pprev;
};

/* Everything that the API has; control thread. */
struct api {
	struct daemon *daemon;
	struct MHD_Daemon *mhd;
	struct loop_source listen_src, mhd_src, timer_src;
	int spare_fd;	/* given up for a moment when descriptors run out */
	bool inherited; /* the socket file is the service manager's */
	char *path;
	struct conn *conns;
	uint32_t nr_conns;
	struct api_request *parked;
	uint64_t swept_ms;
	bool stopping;
};

uint64_t api_now_ms(void); /* CLOCK_MONOTONIC */
void api_unpark(struct api_request *req);

/* MHD's callbacks; cls is struct api. */
enum MHD_Result api_request_step(void *cls, struct MHD_Connection *c, const char *url,
				 const char *method, const char *version, const char *data,
				 size_t *len, void **con_cls);
void api_request_over(void *cls, struct MHD_Connection *c, void **con_cls,
		      enum MHD_RequestTerminationCode why);
