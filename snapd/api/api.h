/* SPDX-License-Identifier: MIT */
/*
 * api: HTTP and JSON on a Unix socket, on the control thread.  docs/openapi.yaml
 * describes the interface; api_routes[] is the same as a table, and a test holds
 * the two together.
 */
#pragma once

#include <stddef.h>

#include "snapd/util/err.h"

struct daemon;
struct api_request;

/* Listen on config.api_socket and add the sources to the control loop (loop_add()).
 * jobs_start() and the store must be there.  -EADDRINUSE: another daemon answers
 * on that socket. */
int api_start(struct daemon *d, struct err *e);
/* Answers what can be answered, closes every connection, and removes the socket.
 * Control thread, before jobs_stop().  Accepts an API that never started. */
void api_stop(struct daemon *d);
/* The control loop calls this each time daemon->wake_fd fired, after reading it:
 * clients may be waiting for a job that changed. */
void api_wake(struct daemon *d);

struct api_route {
	const char *method;
	const char *path; /* as in docs/openapi.yaml: "/v1/vms/{name}" */
	int (*fn)(struct api_request *req);
};
extern const struct api_route api_routes[];
extern const size_t api_nr_routes;
