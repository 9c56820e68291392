/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as what QEMU's monitor says, from its greeting on, to everything that the adapter
 * asks of it.  The other end hangs up behind them.  First byte: how much is asked.  Each call
 * ends, with a reason where it failed, and a dead session stays dead.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "adapters/qemu/info.h"
#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

#define SAID_MAX   (64u << 10) /* the socket holds more: nobody waits */
#define TIMEOUT_MS 1000u

static unsigned int nr_gone;

static void on_event(void *opaque, enum qmp_event event)
{
	PROMISE(event <= QMP_EVENT_GONE && !nr_gone);
	nr_gone += event == QMP_EVENT_GONE;
}

static void told(int r, const struct err *e)
{
	PROMISE(r <= 0 && (r == 0) == !e->text[0]);
}

static void save(struct qmp *q)
{
	struct err e = {0};
	size_t len;
	int fd, r = qmp_save(q, TIMEOUT_MS, &fd, &len, &e);

	told(r, &e);
	if (!r)
		close(fd);
}

static void ask_info(struct qmp *q)
{
	struct err e = {0}, why = {0};
	json_t *info = NULL;

	told(qemu_info_read(q, &info, &e), &e);
	if (info)
		told(qemu_info_compatible(info, info, &why), &why);
	json_decref(info);
}

static void ask(struct qmp *q, unsigned int what)
{
	struct err e[5] = {0};
	enum qmp_run run;
	bool ran;

	told(qmp_poll(q, &e[0]), &e[0]);
	told(qmp_status(q, &run, &e[1]), &e[1]);
	if (what & 1)
		told(qmp_stop(q, TIMEOUT_MS, &ran, &e[2]), &e[2]);
	if (what & 2)
		save(q);
	if (what & 4)
		told(qmp_load(q, TIMEOUT_MS, "stream", 6, &e[3]), &e[3]);
	if (what & 8)
		ask_info(q);
	told(qmp_cont(q, TIMEOUT_MS, &e[4]), &e[4]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct qmp_config config = {.timeout_ms = TIMEOUT_MS, .event = on_event};
	struct err e = {0};
	struct qmp *q;
	int ends[2], r;

	if (!len || len > SAID_MAX)
		return 0;
	nr_gone = 0;
	PROMISE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	PROMISE(send(ends[1], data + 1, len - 1, MSG_NOSIGNAL) == (ssize_t)len - 1);
	PROMISE(!shutdown(ends[1], SHUT_WR));
	config.fd = ends[0];
	r = qmp_open(&config, &q, &e);
	told(r, &e);
	if (!r)
		ask(q, data[0]);
	qmp_close(q);
	close(ends[1]);
	return 0;
}
