/* SPDX-License-Identifier: MIT */
/*
 * Any request to the HTTP API of a real service: first byte the route, then the name
 * in its path up to a NUL, then the body.  Each gets one well-formed answer, never
 * status 500.
 */
#include <ctype.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "snapd/api/api.h"
#include "snapd/daemon/loop.h"
#include "snapd/schedule/scheduler.h"
#include "snapd/upkeep/scrub.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/service.h"

#define BODY_MAX   (80u << 10) /* more than the service takes */
#define ANSWER_MAX (256u << 10)

static struct service service;
static char path[80];
static pthread_t thread;

static void *control(void *arg)
{
	loop_run(&service.d);
	return NULL;
}

static void stop(void)
{
	service.d.stopping = true;
	daemon_wake(&service.d);
	pthread_join(thread, NULL);
	policies_stop(&service.d);
	api_stop(&service.d);
	scrub_stop(&service.d);
	service_stop(&service);
}

static void start(void)
{
	char policies[80];
	struct err e = {0};

	service_start(&service, NULL);
	snprintf(path, sizeof(path), "%s/api", service.dir);
	service.d.config.api_socket = strdup(path);
	service.d.config.agent_socket = strdup(path);
	service.d.config.store_dir = strdup(service.dir);
	snprintf(policies, sizeof(policies), "%s/policies", service.dir);
	PROMISE(!mkdir(policies, 0700));
	service.d.config.policy_dir = strdup(policies);
	PROMISE(!policies_start(&service.d, &e));
	PROMISE(!scrub_start(&service.d, &e));
	PROMISE(!api_start(&service.d, &e));
	PROMISE(!pthread_create(&thread, NULL, control, NULL));
	atexit(stop);
}

/* The route's path with `name`, percent-encoded, for what stands in braces. */
static void write_path(FILE *f, const char *route, const uint8_t *name, size_t len)
{
	for (; *route; route++) {
		if (*route != '{') {
			fputc(*route, f);
			continue;
		}
		for (size_t i = 0; i < len; i++)
			fprintf(f, isalnum(name[i]) ? "%c" : "%%%02x", name[i]);
		while (*route != '}')
			route++;
	}
}

static void exchange(const char *request, size_t len)
{
	struct sockaddr_un sun = {.sun_family = AF_UNIX};
	static char answer[ANSWER_MAX + 1];
	struct timeval limit = {.tv_sec = 20};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), status = 0;
	size_t got = 0;
	ssize_t n;

	strcpy(sun.sun_path, path);
	PROMISE(fd >= 0 && !connect(fd, (struct sockaddr *)&sun, sizeof(sun)));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	for (size_t at = 0; at < len; at += (size_t)n) {
		do
			n = send(fd, request + at, len - at, MSG_NOSIGNAL);
		while (n < 0 && errno == EINTR);
		if (n <= 0) /* it need not read all of what is too long */
			break;
	}
	do {
		n = recv(fd, answer + got, ANSWER_MAX - got, 0);
		got += (size_t)MAX(n, (ssize_t)0);
	} while (n > 0 || (n < 0 && errno == EINTR));
	answer[got] = '\0';
	PROMISE(sscanf(answer, "HTTP/1.1 %3d", &status) == 1);
	if (status == 500)
		fprintf(stderr, "%s\n%s\n", request, answer);
	PROMISE(status >= 200 && status < 600 && status != 500);
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	const struct api_route *route;
	char *request = NULL;
	size_t size, name;
	FILE *f;

	if (!service.d.store)
		start();
	if (!len)
		return 0;
	route = &api_routes[data[0] % api_nr_routes];
	data++;
	len = MIN(len - 1, (size_t)BODY_MAX);
	name = strnlen((const char *)data, len);
	f = open_memstream(&request, &size);
	PROMISE(f);
	fprintf(f, "%s ", route->method);
	write_path(f, route->path, data, name);
	data += MIN(name + 1, len);
	len -= MIN(name + 1, len);
	fprintf(f,
		" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n",
		len);
	fwrite(data, 1, len, f);
	fclose(f);
	exchange(request, size);
	free(request);
	return 0;
}
