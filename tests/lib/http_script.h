/* SPDX-License-Identifier: MIT */
/*
 * http_script: a server that does what a test says, and remembers what it was asked.  In:
 * steps, one for each request in the order of their coming; out: bytes on a socket of
 * 127.0.0.1, as they stand: right, wrong, cut off, late, or none.
 *
 * Each connection has a thread of its own.  A request beyond the last step is answered with
 * status 599, and counted.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#define HTTP_SCRIPT_REQUESTS 64
#define HTTP_SCRIPT_CONNS    256

enum http_then {
	HTTP_KEEP,    /* keep the connection for the next request */
	HTTP_CLOSE,   /* close it in order */
	HTTP_RESET,   /* break it off */
	HTTP_HANG,    /* say no more */
	HTTP_DRIBBLE, /* say the body at a byte each 5 ms */
};

struct http_step {
	const char *reply; /* NULL: none */
	size_t len;	   /* 0: a string */
	enum http_then then;
	bool before_body; /* act when the head of the request is read */
};

struct http_request {
	char head[6000]; /* request line and headers */
	char *body;
	size_t len;
};

struct http_script {
	pthread_mutex_t lock;
	const struct http_step *steps; /* the test's, under lock */
	int nr_steps, nr_requests;
	struct http_request
		requests[HTTP_SCRIPT_REQUESTS]; /* read them when no call is under way */
	int listen_fd, port;
	void *tls; /* SSL_CTX */
	char cert_file[64];
	pthread_t thread;
	int conn_fds[HTTP_SCRIPT_CONNS]; /* under lock */
	pthread_t conn_threads[HTTP_SCRIPT_CONNS];
	int nr_conns;
};

void http_script_start(struct http_script *h, bool tls);
void http_script_stop(struct http_script *h);
/* Forget what was asked, and do these next. */
void http_script_set(struct http_script *h, const struct http_step *steps, int nr_steps);
