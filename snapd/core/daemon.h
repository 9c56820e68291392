/* SPDX-License-Identifier: MIT */
/*
 * daemon: what the daemon's files share.  One struct daemon per process, made by
 * main.c, torn down after every thread has ended.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapd/core/job.h"
#include "snapd/store.h"

struct vm;
struct api;
struct pool;
struct policies;
struct backups;
struct vm_tags;
struct scrub;

struct daemon_config {
	char *store_dir; /* owned strings */
	char *api_socket;
	char *agent_socket;
	char *socket_group;   /* who may connect to either socket, besides root; NULL: all */
	char *policy_dir;     /* one file a policy */
	char *vm_tags;	      /* file of patterns and tags */
	char *encryption_key; /* key file; NULL: the store is not encrypted */
	char *rekey;	      /* only change to this key file, then end; NULL: serve */
	char *compression;    /* of new pages; NULL: as the store says */
	char *backup;	      /* repository where a request names none; NULL: none */
	char *backup_key;     /* key file; NULL: new repositories are not encrypted */
	char *backup_endpoint, *backup_region,
		*backup_profile;    /* of s3://; NULL: as objstore.h says */
	char *backup_credentials;   /* file */
	char *backup_ca;	    /* file */
	uint64_t backup_rate;	    /* bytes a second, each way; 0: no limit */
	uint32_t backup_style;	    /* enum objstore_style */
	uint32_t backup_grace_s;    /* of new repositories; 0: default */
	uint64_t staging_max_bytes; /* per VM, for the pages copied in the pause; default 1 GiB */
	uint64_t store_max_bytes;   /* 0: no limit */
	uint64_t store_soft_bytes;  /* above it policies thin out; 0: no limit */
	uint64_t scrub_period_s;    /* 0: only when asked for; default 30 days */
	uint64_t scrub_rate;	    /* bytes a second; 0: as fast as it goes; default 20 MiB */
	uint32_t segment_bytes;	    /* 0: default */
	uint32_t pause_timeout_ms;  /* default 10000 */
	uint32_t self_check_max_ms; /* of a pause, for comparing memory; default 5000 */
	uint32_t write_fault_ns;    /* a write fault of a guest, for what it loses; default 5000 */
	uint32_t vcpus_wait_ms;	    /* for the last vCPU of a VM to be restored; default 5000 */
	bool post_mortem;	    /* keep the memory of VMs whose VMM dies; default off */
	uint32_t early_min_frames;  /* early capture only above this; default 4096 */
	uint32_t dedup;		    /* enum store_dedup */
	uint64_t dedup_bytes;	    /* 0: default */
	int log_level;
	uint32_t log_format; /* enum log_format */
};

struct daemon {
	struct daemon_config config;
	struct store *store;
	struct pool *pool; /* copying and hashing, for all VMs */
	struct api *api;
	int epoll_fd;
	int wake_fd; /* eventfd: a job changed, a VM came or went */
	_Atomic bool stopping;
	_Atomic bool in_doubt; /* stopping since the store must be opened again */

	pthread_mutex_t vms_lock;   /* vms list, names */
	pthread_cond_t vms_changed; /* a VM's thread ended, a VM was lost */
	struct vm *vms;

	struct vm_tags *tags;		/* vm_tags_open() in tags.h; NULL: none */
	struct policies *policies;	/* policies_start() in schedule/scheduler.h */
	struct backups *backups;	/* backup_start() in backup/backup.h */
	_Atomic uint64_t room_looked_s; /* upkeep/room.c's: when it looked, and what it saw */
	_Atomic bool room_short;
	struct scrub *scrub; /* scrub_start() in upkeep/scrub.h */
	struct jobs *jobs;   /* registry: jobs_start(), jobs_stop() in job.h */
};

/* daemon.c: a daemon with default configuration, no store, no sockets; and its end,
 * after vm_stop_all() and api_stop(). */
int daemon_init(struct daemon *d, struct err *e);
void daemon_deinit(struct daemon *d);

/* What the control loop (daemon/loop.h) waits for.  `fn` runs on the control thread. */
struct loop_source {
	int fd;
	void (*fn)(struct loop_source *src, uint32_t events);
};
int loop_add(struct daemon *d, struct loop_source *src, uint32_t events);
void loop_del(struct daemon *d, struct loop_source *src);
/* Wake the control thread (any thread, async-signal-safe). */
void daemon_wake(struct daemon *d);
