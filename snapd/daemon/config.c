/* SPDX-License-Identifier: MIT */
/*
 * Options and configuration file.  Every setting of the file has an option of the
 * same name with '-' for '_'; options win, in whatever order they stand.  Without
 * --config the file /etc/snapd/snapd.conf is read if there is one.
 */
#include "snapd/daemon/config.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "include/snapd/format.h"
#include "snapd/backup/layout.h"
#include "snapd/backup/objstore.h"
#include "snapd/daemon/logging.h"
#include "snapd/policy/keep.h"
#include "snapd/store/codec.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/inifile.h"
#include "snapd/util/log.h"

#define CONFIG_DEFAULT	   "/etc/snapd/snapd.conf"
#define STORE_DEFAULT	   "/var/lib/snapd"
#define CREDENTIAL	   "snapd.encryption-key"
#define POLICY_DIR_DEFAULT "/etc/snapd/policies.d"
#define VM_TAGS_DEFAULT	   "/etc/snapd/vm-tags.conf"

enum kind { TEXT, COMPRESSION, BYTES, SPAN, NUMBER, SWITCH, WORD };

static const char *const level_words[] = {
	[LOG_LVL_ERR] = "err",	 [LOG_LVL_WARN] = "warning", [LOG_LVL_NOTICE] = "notice",
	[LOG_LVL_INFO] = "info", [LOG_LVL_DEBUG] = "debug",
};
static const char *const log_format_words[] = {
	[LOG_FORMAT_AUTO] = "auto", [LOG_FORMAT_JOURNAL] = "journal",
	[LOG_FORMAT_TEXT] = "text", [LOG_FORMAT_LOGFMT] = "logfmt",
	[LOG_FORMAT_JSON] = "json",
};
static const char *const style_words[] = {
	[OBJSTORE_STYLE_AUTO] = "auto",
	[OBJSTORE_STYLE_PATH] = "path",
	[OBJSTORE_STYLE_VIRTUAL] = "virtual",
};
static const char *const dedup_words[] = {
	[STORE_DEDUP_OWNER] = "owner",
	[STORE_DEDUP_VM] = "vm",
	[STORE_DEDUP_STORE] = "store",
	[STORE_DEDUP_OFF] = "off",
};

static const struct setting {
	const char *key;
	const char *option; /* long option; NULL: only in the file */
	enum kind kind;
	size_t offset;
	size_t size;
	uint64_t min, max;
	const char *const *words; /* WORD: the value is an index, min to max */
} settings[] = {
#define AT(f) offsetof(struct daemon_config, f), sizeof(((struct daemon_config *)0)->f)
	{"store", "store", TEXT, AT(store_dir), 0, 0},
	{"socket", "socket", TEXT, AT(api_socket), 0, 0},
	{"agent_socket", "agent-socket", TEXT, AT(agent_socket), 0, 0},
	{"policies", "policies", TEXT, AT(policy_dir), 0, 0},
	{"vm_tags", "vm-tags", TEXT, AT(vm_tags), 0, 0},
	{"socket_group", "socket-group", TEXT, AT(socket_group), 0, 0},
	{"staging_max", "staging-max", BYTES, AT(staging_max_bytes), 4 << 20, 1ull << 44},
	{"store_max", "store-max", BYTES, AT(store_max_bytes), 0, 1ull << 60},
	{"store_soft_max", "store-soft-max", BYTES, AT(store_soft_bytes), 0, 1ull << 60},
	{"scrub_period", "scrub-period", SPAN, AT(scrub_period_s), 0, 0},
	{"scrub_rate", "scrub-rate", BYTES, AT(scrub_rate), 0, 1ull << 40},
	{"encryption_key", "encryption-key", TEXT, AT(encryption_key), 0, 0},
	{"compression", "compression", COMPRESSION, AT(compression), 0, 0},
	{"segment", "segment", BYTES, AT(segment_bytes), SEG_BYTES_MIN, SEG_BYTES_MAX},
	{"pause_timeout_ms", "pause-timeout-ms", NUMBER, AT(pause_timeout_ms), 10, 600000},
	{"self_check_max_ms", "self-check-max-ms", NUMBER, AT(self_check_max_ms), 1, 20000},
	{"write_fault_ns", "write-fault-ns", NUMBER, AT(write_fault_ns), 0, 1000000},
	{"vcpus_wait_ms", "vcpus-wait-ms", NUMBER, AT(vcpus_wait_ms), 1, 600000},
	{"post_mortem", "post-mortem", SWITCH, AT(post_mortem), 0, 0},
	{"early_min_frames", "early-min-frames", NUMBER, AT(early_min_frames), 1, UINT32_MAX},
	{"dedup", "dedup", WORD, AT(dedup), STORE_DEDUP_OWNER, STORE_DEDUP_OFF, dedup_words},
	{"dedup_memory", "dedup-memory", BYTES, AT(dedup_bytes), 1 << 20, 1ull << 40},
	{"backup", "backup", TEXT, AT(backup), 0, 0},
	{"backup_key", "backup-key", TEXT, AT(backup_key), 0, 0},
	{"backup_endpoint", "backup-endpoint", TEXT, AT(backup_endpoint), 0, 0},
	{"backup_style", "backup-style", WORD, AT(backup_style), OBJSTORE_STYLE_AUTO,
	 OBJSTORE_STYLE_VIRTUAL, style_words},
	{"backup_region", "backup-region", TEXT, AT(backup_region), 0, 0},
	{"backup_credentials", "backup-credentials", TEXT, AT(backup_credentials), 0, 0},
	{"backup_profile", "backup-profile", TEXT, AT(backup_profile), 0, 0},
	{"backup_ca", "backup-ca", TEXT, AT(backup_ca), 0, 0},
	{"backup_rate", "backup-rate", BYTES, AT(backup_rate), 0, 1ull << 40},
	{"backup_grace", "backup-grace", NUMBER, AT(backup_grace_s), BK_GRACE_MIN_S,
	 BK_GRACE_MAX_S},
	{"log_level", "log-level", WORD, AT(log_level), LOG_LVL_ERR, LOG_LVL_DEBUG, level_words},
	{"log_format", "log-format", WORD, AT(log_format), LOG_FORMAT_AUTO, LOG_FORMAT_JSON,
	 log_format_words},
#undef AT
};

/* Digits and, for bytes, one of K, M, G, T. */
static int parse_number(const char *value, bool bytes, uint64_t *ret)
{
	static const char units[] = "KMGT";
	const char *unit;
	char *end;

	if (value[0] < '0' || value[0] > '9')
		return -EINVAL;
	errno = 0;
	*ret = strtoull(value, &end, 10);
	if (errno)
		return -EINVAL;
	unit = bytes && *end ? strchr(units, *end) : NULL;
	if (unit) {
		int shift = 10 * (int)(unit - units + 1);

		if (*ret > UINT64_MAX >> shift)
			return -EINVAL;
		*ret <<= shift;
		end++;
	}
	return *end ? -EINVAL : 0;
}

static int set_number(const struct setting *s, void *field, const char *value, struct err *e)
{
	uint64_t v;

	if (parse_number(value, s->kind == BYTES, &v) || v < s->min || v > s->max)
		return err_set(e, EINVAL, "%s: '%s' is not a number from %llu to %llu%s", s->key,
			       value, (unsigned long long)s->min, (unsigned long long)s->max,
			       s->kind == BYTES ? " (K, M, G, T may follow)" : "");
	if (s->size == sizeof(uint64_t))
		*(uint64_t *)field = v;
	else
		*(uint32_t *)field = (uint32_t)v;
	return 0;
}

static int set_span(const char *key, uint64_t *field, const char *value, struct err *e)
{
	uint64_t v = 0;

	if (strcmp(value, "off") != 0 && keep_parse_span(value, &v))
		return err_set(e, EINVAL,
			       "%s: '%s' is neither off nor a time such as 30d, 12h, 90s", key,
			       value);
	*field = v;
	return 0;
}

static int set_switch(const char *key, bool *field, const char *value, struct err *e)
{
	if (strcmp(value, "on") != 0 && strcmp(value, "off") != 0)
		return err_set(e, EINVAL, "%s: '%s' is neither on nor off", key, value);
	*field = !strcmp(value, "on");
	return 0;
}

static int set_word(const struct setting *s, void *field, const char *value, struct err *e)
{
	char all[128] = "";

	for (uint32_t i = (uint32_t)s->min; i <= s->max; i++) {
		if (!strcmp(s->words[i], value)) {
			*(uint32_t *)field = i;
			return 0;
		}
		snprintf(all + strlen(all), sizeof(all) - strlen(all), "%s%s",
			 i > s->min ? ", " : "", s->words[i]);
	}
	return err_set(e, EINVAL, "%s: '%s' is none of %s", s->key, value, all);
}

static int set_text(void *field, const char *value, struct err *e)
{
	char *copy = strdup(value);

	if (!copy)
		return err_set(e, ENOMEM, "out of memory");
	free(*(char **)field);
	*(char **)field = copy;
	return 0;
}

static int set_compression(void *field, const char *value, struct err *e)
{
	struct codec_policy policy;
	int r = codec_parse(value, &policy, e);

	return r ? r : set_text(field, value, e);
}

int config_set(struct daemon_config *c, const char *key, const char *value, struct err *e)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		const struct setting *s = &settings[i];
		void *field = (char *)c + s->offset;

		if (strcmp(s->key, key) != 0)
			continue;
		if (s->kind == TEXT)
			return set_text(field, value, e);
		if (s->kind == COMPRESSION)
			return set_compression(field, value, e);
		if (s->kind == SPAN)
			return set_span(s->key, field, value, e);
		if (s->kind == SWITCH)
			return set_switch(s->key, field, value, e);
		return s->kind == WORD ? set_word(s, field, value, e)
				       : set_number(s, field, value, e);
	}
	return err_set(e, EINVAL, "unknown setting '%s'", key);
}

static int on_setting(void *arg, const char *section, const char *key, const char *value,
		      struct err *e)
{
	if (strcmp(section, "snapd") != 0 && section[0])
		return err_set(e, EINVAL, "unknown section [%.40s]", section);
	return config_set(arg, key, value, e);
}

static int read_file(struct daemon_config *c, const char *path, bool must, struct err *e)
{
	return !must && access(path, F_OK) ? 0 : inifile_read(path, on_setting, c, e);
}

static void usage(void)
{
	puts("Usage: snapd [OPTION]...\n"
	     "Checkpoints, restores and rolls back KVM guests whose VMM links libsnapd-agent.\n"
	     "\n"
	     "  --config FILE           settings, one 'name = value' a line, each of the options\n"
	     "                          below with '_' for '-' (default " CONFIG_DEFAULT ")\n"
	     "  --store DIR             where snapshots are kept (default " STORE_DEFAULT ")\n"
	     "  --socket PATH           HTTP API (default " SNAPD_API_SOCKET_DEFAULT ")\n"
	     "  --agent-socket PATH     for VMMs (default " SNAPD_AGENT_SOCKET_DEFAULT ")\n"
	     "  --socket-group GROUP    only this group and root may connect (default: everyone;\n"
	     "                          each user sees its own VMs only)\n"
	     "  --policies DIR          a file NAME.conf for each policy (default\n"
	     "                          " POLICY_DIR_DEFAULT ")\n"
	     "  --vm-tags FILE          tags of VMs, for policies (default\n"
	     "                          " VM_TAGS_DEFAULT ")\n"
	     "  --staging-max BYTES     memory a VM, for pages copied in the pause (default 1G)\n"
	     "  --store-max BYTES       limit of the store on disk (default 0: none)\n"
	     "  --store-soft-max BYTES  above it policies leave out every second point (default "
	     "0:\n"
	     "                          none)\n"
	     "  --scrub-period TIME     read and check every byte once in it, such as 30d; off\n"
	     "                          (default 30d)\n"
	     "  --scrub-rate BYTES      a second at most, for that (default 20M; 0: no limit)\n"
	     "  --compression HOW       none, lz4, zstd[:LEVEL] for what is stored from now on\n"
	     "                          (default: as the store says; a new one: lz4)\n"
	     "  --encryption-key FILE   key of an encrypted store, 32 bytes or more; a new store "
	     "is\n"
	     "                          encrypted with it (default: systemd credential\n"
	     "                          " CREDENTIAL ", if there is one)\n"
	     "  --rekey FILE            change the key to this file's and end\n"
	     "  --segment BYTES         size of new segment files (default 64M)\n"
	     "  --pause-timeout-ms N    give a snapshot up when a VM does not stop (default "
	     "10000)\n"
	     "  --self-check-max-ms N   how much longer a self-check may make a pause (default "
	     "5000)\n"
	     "  --write-fault-ns N      what a guest's first write to a page after a harvest "
	     "costs,\n"
	     "                          for max_overhead (default 5000)\n"
	     "  --vcpus-wait-ms N       for the last vCPU of a VM to be restored (default 5000)\n"
	     "  --post-mortem on|off    keep the memory of a VM whose VMM dies (default off)\n"
	     "  --early-min-frames N    copy pages ahead of the pause only above it (default "
	     "4096)\n"
	     "  --dedup DOMAIN          whose equal pages are stored once: vm, owner (all VMs of "
	     "a\n"
	     "                          user; default), store, off\n"
	     "  --dedup-memory BYTES    of the table of duplicates, at most (default: 1/32 of the\n"
	     "                          machine's, up to 256M)\n"
	     "  --backup URL            repository for backups where none is named:\n"
	     "                          s3://BUCKET/PREFIX or file:///PATH\n"
	     "  --backup-key FILE       its key, 32 bytes or more; a new one is encrypted with it\n"
	     "  --backup-endpoint URL   of an S3 server other than AWS's\n"
	     "  --backup-region NAME    of the bucket (default us-east-1)\n"
	     "  --backup-credentials FILE  in the form of ~/.aws/credentials\n"
	     "  --backup-style HOW      where the bucket stands: path, virtual (in the host's "
	     "name),\n"
	     "                          auto (default: virtual at AWS, else path)\n"
	     "  --backup-profile NAME   section of that file (default default)\n"
	     "  --backup-ca FILE        whom to trust, in place of the system's authorities\n"
	     "  --backup-rate BYTES     a second at most, each way (default 0: no limit)\n"
	     "  --backup-grace SECONDS  what a new repository keeps after it is forgotten\n"
	     "                          (default 86400)\n"
	     "  --log-level LEVEL       err, warning, notice, info, debug (default info)\n"
	     "  --log-format FORM       auto, journal, text, logfmt, json (default auto: the\n"
	     "                          journal's fields when stderr is the journal, else text)\n"
	     "  --help, --version\n"
	     "\n"
	     "SIGTERM, SIGINT: abandon what is not committed, let every VM run on, end.\n"
	     "Exit codes: 0 ended by signal, 1 failure, 2 usage, 3 store is in use or damaged.");
}

#define OPT_FIRST 256
#define NR_FIXED  4

/* A key that systemd hands to the service (LoadCredential=). */
static int find_credential(struct daemon_config *c, struct err *e)
{
	const char *dir = getenv("CREDENTIALS_DIRECTORY");
	char path[4096];

	if (!dir || c->encryption_key ||
	    snprintf(path, sizeof(path), "%s/" CREDENTIAL, dir) >= (int)sizeof(path) ||
	    access(path, F_OK))
		return 0;
	return set_text(&c->encryption_key, path, e);
}

static int fill_defaults(struct daemon_config *c, struct err *e)
{
	int err = find_credential(c, e);

	if (!err && !c->store_dir)
		err = set_text(&c->store_dir, STORE_DEFAULT, e);
	if (!err && !c->policy_dir)
		err = set_text(&c->policy_dir, POLICY_DIR_DEFAULT, e);
	if (!err && !c->vm_tags)
		err = set_text(&c->vm_tags, VM_TAGS_DEFAULT, e);
	if (!err && !c->api_socket)
		err = set_text(&c->api_socket, SNAPD_API_SOCKET_DEFAULT, e);
	if (!err && !c->agent_socket)
		err = set_text(&c->agent_socket, SNAPD_AGENT_SOCKET_DEFAULT, e);
	return err;
}

int config_from_args(struct daemon_config *c, int argc, char **argv, struct err *e)
{
	struct option longs[ARRAY_SIZE(settings) + NR_FIXED + 1] = {
		{"config", required_argument, NULL, 'c'},
		{"rekey", required_argument, NULL, 'r'},
		{"help", no_argument, NULL, 'h'},
		{"version", no_argument, NULL, 'v'},
	};
	const char *values[ARRAY_SIZE(settings)] = {}, *file = NULL, *rekey = NULL;
	int opt, err;

	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		longs[NR_FIXED + i] = (struct option){settings[i].option, required_argument, NULL,
						      OPT_FIRST + (int)i};
	optind = 1;
	opterr = 0;
	while ((opt = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		if (opt == 'h' || opt == 'v') {
			if (opt == 'h')
				usage();
			else
				puts("snapd " SNAPD_VERSION);
			return CONFIG_EXIT;
		}
		if (opt == '?')
			return err_set(e, EINVAL, "%s: unknown option, or its value is missing",
				       argv[optind - 1]);
		if (opt == 'c')
			file = optarg;
		else if (opt == 'r')
			rekey = optarg;
		else
			values[opt - OPT_FIRST] = optarg;
	}
	if (optind < argc)
		return err_set(e, EINVAL, "unexpected argument '%s'", argv[optind]);
	err = read_file(c, file ? file : CONFIG_DEFAULT, !!file, e);
	for (size_t i = 0; !err && i < ARRAY_SIZE(settings); i++)
		if (values[i])
			err = config_set(c, settings[i].key, values[i], e);
	if (!err && rekey)
		err = set_text(&c->rekey, rekey, e);
	if (!err)
		err = fill_defaults(c, e);
	if (!err && rekey && !c->encryption_key)
		err = err_set(e, EINVAL, "--rekey needs --encryption-key, the key up to now");
	return err;
}
