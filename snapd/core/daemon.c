/* SPDX-License-Identifier: MIT */
/* What a daemon has before it has a store or a socket: defaults, locks, the pool, and what its
 * control loop waits for. */
#include "snapd/core/daemon.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "snapd/util/pool.h"
#include "snapd/util/log.h"

#define STAGING_MAX_DEFAULT	  (1ull << 30)
#define EARLY_MIN_FRAMES_DEFAULT  4096
#define SELF_CHECK_MAX_MS_DEFAULT 5000
#define WRITE_FAULT_NS_DEFAULT	  5000
#define VCPUS_WAIT_MS_DEFAULT	  5000
#define PAUSE_TIMEOUT_MS_DEFAULT  10000
#define SCRUB_PERIOD_DEFAULT	  (30ull * 86400)
#define SCRUB_RATE_DEFAULT	  (20ull << 20)

int daemon_init(struct daemon *d, struct err *e)
{
	struct epoll_event wake = {.events = EPOLLIN}; /* data.ptr NULL: loop.c's own */
	int err;

	*d = (struct daemon){
		.config = {.staging_max_bytes = STAGING_MAX_DEFAULT,
			   .pause_timeout_ms = PAUSE_TIMEOUT_MS_DEFAULT,
			   .self_check_max_ms = SELF_CHECK_MAX_MS_DEFAULT,
			   .write_fault_ns = WRITE_FAULT_NS_DEFAULT,
			   .vcpus_wait_ms = VCPUS_WAIT_MS_DEFAULT,
			   .scrub_period_s = SCRUB_PERIOD_DEFAULT,
			   .scrub_rate = SCRUB_RATE_DEFAULT,
			   .early_min_frames = EARLY_MIN_FRAMES_DEFAULT,
			   .log_level = LOG_LVL_INFO},
	};
	pthread_mutex_init(&d->vms_lock, NULL);
	pthread_cond_init(&d->vms_changed, NULL);
	d->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	d->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (d->epoll_fd < 0 || d->wake_fd < 0 ||
	    epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, d->wake_fd, &wake))
		return err_errno(e, errno, "epoll, eventfd");
	err = pool_create(0, &d->pool);
	return err ? err_errno(e, -err, "start threads") : 0;
}

void daemon_deinit(struct daemon *d)
{
	pool_destroy(d->pool);
	if (d->epoll_fd >= 0)
		close(d->epoll_fd);
	if (d->wake_fd >= 0)
		close(d->wake_fd);
	pthread_cond_destroy(&d->vms_changed);
	pthread_mutex_destroy(&d->vms_lock);
	free(d->config.store_dir);
	free(d->config.api_socket);
	free(d->config.agent_socket);
	free(d->config.socket_group);
	free(d->config.policy_dir);
	free(d->config.vm_tags);
	free(d->config.compression);
	free(d->config.encryption_key);
	free(d->config.rekey);
	free(d->config.backup);
	free(d->config.backup_key);
	free(d->config.backup_endpoint);
	free(d->config.backup_region);
	free(d->config.backup_profile);
	free(d->config.backup_credentials);
	free(d->config.backup_ca);
}

int loop_add(struct daemon *d, struct loop_source *src, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.ptr = src};

	return epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, src->fd, &ev) ? -errno : 0;
}

void loop_del(struct daemon *d, struct loop_source *src)
{
	epoll_ctl(d->epoll_fd, EPOLL_CTL_DEL, src->fd, NULL);
}

void daemon_wake(struct daemon *d)
{
	uint64_t one = 1;

	(void)!write(d->wake_fd, &one, sizeof(one));
}
