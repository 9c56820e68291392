/* SPDX-License-Identifier: MIT */
/*
 * report: what the machine does and did, as JSON for programs and as one line for
 * people.  Main's thread; guest counters are read from guest memory.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "vmm/machine.h"

struct totals {
	uint64_t writes, verified, device_ok, hole_loads, hole_stores;
};

static struct totals add_up(struct machine *m)
{
	struct totals t = {0};
	uint32_t i;

	for (i = 0; i < m->opt->nr_vcpus; i++) {
		t.writes += MACHINE_CTL(m, i, counter);
		t.verified += MACHINE_CTL(m, i, verified);
		t.device_ok += MACHINE_CTL(m, i, device_ok);
		t.hole_loads += atomic_load(&m->vcpus[i].hole_loads);
		t.hole_stores += atomic_load(&m->vcpus[i].hole_stores);
	}
	return t;
}

static void put_string(FILE *f, const char *s)
{
	fputc('"', f);
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			fputc('\\', f);
		fputc((unsigned char)*s < ' ' ? ' ' : *s, f);
	}
	fputc('"', f);
}

static void put_writes(FILE *f, struct machine *m)
{
	uint32_t i;

	fputs(",\"writes\":[", f);
	for (i = 0; i < m->opt->nr_vcpus; i++)
		fprintf(f, "%s%" PRIu64, i ? "," : "", MACHINE_CTL(m, i, counter));
	fputc(']', f);
}

static void put_punches(FILE *f, struct machine *m)
{
	struct punch_stats s;
	int i;

	punch_get_stats(m, &s);
	fprintf(f, ",\"punches\":{\"total\":%" PRIu64, s.total);
	for (i = 0; i < PUNCH_NR_PATTERNS; i++)
		fprintf(f, ",\"%s\":%" PRIu64, punch_names[i], s.ops[i]);
	fputc('}', f);
}

static void put_agent(FILE *f, struct machine *m)
{
	struct snapd_vm_stats s;

	snapd_vm_get_stats(m->agent, &s);
	fprintf(f,
		",\"agent\":{\"harvested\":%" PRIu64 ",\"reset\":%" PRIu64 ",\"published\":%" PRIu64
		",\"ring_full\":%" PRIu64 ",\"unresolved\":%" PRIu64 ",\"host_marks\":%" PRIu64
		",\"kicks\":%" PRIu64 ",\"pauses\":%" PRIu64 ",\"reconnects\":%" PRIu64
		",\"slot_changes\":%" PRIu64 "}",
		s.harvested, s.reset, s.published, s.ring_full, s.unresolved, s.host_marks, s.kicks,
		s.pauses, s.reconnects, s.slot_changes);
}

static void put_json(FILE *f, struct machine *m, double seconds)
{
	struct totals t = add_up(m);
	uint64_t epochs, pages, spare_writes, discards;

	fprintf(f, "{\"pid\":%d,\"name\":", (int)getpid());
	put_string(f, m->opt->name ? m->opt->name : "");
	fprintf(f, ",\"ok\":%s,\"seconds\":%.3f,\"seed\":%" PRIu64,
		m->failure[0] ? "false" : "true", seconds, m->opt->seed);
	put_writes(f, m);
	fprintf(f,
		",\"verified\":%" PRIu64 ",\"device_ok\":%" PRIu64 ",\"device_writes\":%" PRIu64
		",\"hole_loads\":%" PRIu64 ",\"hole_stores\":%" PRIu64,
		t.verified, t.device_ok, device_writes(m), t.hole_loads, t.hole_stores);
	spare_get(m, &spare_writes, &discards);
	fprintf(f,
		",\"spare_writes\":%" PRIu64 ",\"discards\":%" PRIu64 ",\"mirror_checks\":%" PRIu64,
		spare_writes, discards, mirror_checks(m));
	put_punches(f, m);
	epochs_get(m, &epochs, &pages);
	fprintf(f, ",\"epochs\":{\"total\":%" PRIu64 ",\"pages\":%" PRIu64 "}", epochs, pages);
	put_agent(f, m);
	fputs(",\"errors\":", f);
	fputs(m->failure[0] ? "1,\"failure\":" : "0,\"failure\":", f);
	put_string(f, m->failure);
	fputs("}\n", f);
}

/* A reader sees the old file or the new one. */
int report_status(struct machine *m, const char *path, double seconds)
{
	char tmp[4096];
	FILE *f;
	int failed;

	if (snprintf(tmp, sizeof(tmp), "%s.%d", path, (int)getpid()) >= (int)sizeof(tmp))
		return -ENAMETOOLONG;
	f = fopen(tmp, "we");
	if (!f)
		return -errno;
	put_json(f, m, seconds);
	failed = fclose(f) || rename(tmp, path);
	return failed ? -errno : 0;
}

static void put_summary(struct machine *m, double seconds)
{
	struct totals t = add_up(m);
	struct snapd_vm_stats s;
	struct punch_stats punches;

	snapd_vm_get_stats(m->agent, &s);
	punch_get_stats(m, &punches);
	printf("snapvm: summary: %.1f s, seed %" PRIu64 ": %" PRIu64 " writes, %" PRIu64
	       " pages verified, errors %d; %" PRIu64 " dirty entries, %" PRIu64
	       " ring-full, %" PRIu64 " kicks, %" PRIu64 " pauses; %" PRIu64
	       " memslot punches, %" PRIu64 " accesses in holes; %" PRIu64 " device writes\n",
	       seconds, m->opt->seed, t.writes, t.verified, m->failure[0] ? 1 : 0, s.harvested,
	       s.ring_full, s.kicks, s.pauses, punches.total, t.hole_loads + t.hole_stores,
	       device_writes(m));
}

void report_final(struct machine *m, double seconds)
{
	if (m->failure[0])
		fprintf(stderr, "snapvm: %s\n", m->failure);
	if (m->opt->json)
		put_json(stdout, m, seconds);
	else if (!m->opt->quiet)
		put_summary(m, seconds);
	fflush(stdout);
}
