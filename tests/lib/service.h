/* SPDX-License-Identifier: MIT */
/*
 * service: the daemon in the test's own process, without its sockets: a store in a
 * temporary directory, VM threads, jobs.  Agents are handed in on socket pairs.
 */
#pragma once

#include "snapd/core/daemon.h"
#include "snapd/core/job.h"
#include "snapd/store.h"
#include "tests/lib/fake_agent.h"

struct service {
	struct daemon d;
	char dir[64];
	bool unchecked; /* rollbacks without comparing memory and state afterwards */
};

/* `config` may change d.config before the store opens; NULL: defaults. */
void service_start(struct service *s, void (*config)(struct daemon_config *c));
void service_restart(struct service *s); /* same store, agents' connections end */
void service_stop(struct service *s);	 /* and remove the directory */

/* Connect, attach, and wait until READY; false: refused. */
bool service_attach(struct service *s, struct fake_agent *a);
/* Run a job on the VM of that agent and wait for its end.  0 and the id of the
 * snapshot made; or the job's error, with its text in e (may be NULL). */
int service_snapshot(struct service *s, struct fake_agent *a, const char *name, uint64_t *id,
		     struct err *e);
int service_rollback(struct service *s, struct fake_agent *a, uint64_t id, struct err *e);
/* With a comparison of all memory; what it found is in service_json(). */
int service_snapshot_checked(struct service *s, struct fake_agent *a, uint64_t *id, struct err *e);
int service_self_check(struct service *s, struct fake_agent *a, struct err *e);
/* The last job's result; borrowed until the next job. */
const json_t *service_json(void);
/* A number of the last job's result. */
int64_t service_result(const char *key);
/* Does the snapshot hold exactly these bytes (truth[] or ram[] of the agent)? */
void service_compare(struct service *s, const struct fake_agent *a, uint64_t id,
		     uint8_t *const bytes[FA_BLOCKS]);
/* Until the VM's state is this one (vm.h), at most 10 s. */
void service_await(struct service *s, const struct fake_agent *a, int state);
