/* SPDX-License-Identifier: MIT */
/* HTTP over the service's Unix socket; see client.h. */
#include "tools/client.h"

#include <curl/curl.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/progress.h"
#include "tools/snapctl.h"

#define BODY_MAX     (1ull << 30)
#define POLL_MS	     "200"
#define STATUS_ERROR 400

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig)
{
	interrupted++;
}

/* Ctrl-C is ours from the first request of something long on; a second one ends
 * snapctl at once. */
static void catch_interrupt(void)
{
	struct sigaction sa = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};

	sigaction(SIGINT, &sa, NULL);
}

struct buf {
	char *data; /* owned; NUL-terminated */
	size_t len;
};

static size_t append(char *data, size_t one, size_t len, void *opaque)
{
	struct buf *b = opaque;
	char *p = b->len + len < BODY_MAX ? realloc(b->data, b->len + len + 1) : NULL;

	if (!p)
		return 0;
	memcpy(p + b->len, data, len);
	b->data = p;
	b->len += len;
	p[b->len] = '\0';
	return len;
}

struct request {
	const struct args *a;
	CURL *curl;
	struct curl_slist *headers;
	char *body; /* owned */
	struct buf answer;
	bool uploads; /* "invalid" is the fault of a file, not of the command line */
	char reason[CURL_ERROR_SIZE];
};

static void cleanup_request(struct request *r)
{
	curl_easy_cleanup(r->curl);
	curl_slist_free_all(r->headers);
	free(r->body);
	free(r->answer.data);
}

char *url_escape(const char *text)
{
	char *e = curl_easy_escape(NULL, text, 0), *copy = e ? strdup(e) : NULL;

	curl_free(e);
	return copy;
}

static int set_url(struct request *r, const char *fmt, const char *value1, const char *value2)
{
	_cleanup_free_ char *v1 = value1 ? url_escape(value1) : NULL;
	_cleanup_free_ char *v2 = value2 ? url_escape(value2) : NULL;
	_cleanup_free_ char *url = NULL;
	const char *values[] = {v1 ? v1 : "", v2 ? v2 : ""};
	size_t len, n = 0;
	FILE *f = open_memstream(&url, &len);

	if (!f || (value1 && !v1) || (value2 && !v2))
		return fail(EXIT_FAILED, "out of memory");
	fputs("http://snapd", f);
	for (const char *p = fmt; *p; p++)
		if (*p == '%' && p[1] == 's' && n < ARRAY_SIZE(values)) {
			fputs(values[n++], f);
			p++;
		} else {
			fputc(*p, f);
		}
	fclose(f);
	curl_easy_setopt(r->curl, CURLOPT_URL, url);
	return 0;
}

static int request_init(struct request *r, const struct args *a, const char *method,
			const char *fmt, const char *value1, const char *value2)
{
	r->a = a;
	r->curl = curl_easy_init();
	if (!r->curl)
		return fail(EXIT_FAILED, "cannot start libcurl");
	curl_easy_setopt(r->curl, CURLOPT_UNIX_SOCKET_PATH, a->socket);
	curl_easy_setopt(r->curl, CURLOPT_CUSTOMREQUEST, method);
	curl_easy_setopt(r->curl, CURLOPT_PROXY, "");
	curl_easy_setopt(r->curl, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(r->curl, CURLOPT_PATH_AS_IS, 1L);
	curl_easy_setopt(r->curl, CURLOPT_ERRORBUFFER, r->reason);
	curl_easy_setopt(r->curl, CURLOPT_WRITEFUNCTION, append);
	curl_easy_setopt(r->curl, CURLOPT_WRITEDATA, &r->answer);
	return set_url(r, fmt, value1, value2);
}

static int exit_code_of(const char *code)
{
	static const struct {
		const char *code;
		int exit;
	} map[] = {
		{"not-found", EXIT_NOT_FOUND},	{"busy", EXIT_CONFLICT},
		{"exists", EXIT_CONFLICT},	{"not-connected", EXIT_CONFLICT},
		{"unsupported", EXIT_CONFLICT}, {"corrupt", EXIT_CORRUPT},
		{"wrong-key", EXIT_CORRUPT},
	};

	for (size_t i = 0; code && i < ARRAY_SIZE(map); i++)
		if (!strcmp(map[i].code, code))
			return map[i].exit;
	return EXIT_FAILED;
}

static int transport_failed(struct request *r, CURLcode rc)
{
	long os_errno = 0;

	progress_clear();
	if (rc == CURLE_COULDNT_CONNECT) {
		curl_easy_getinfo(r->curl, CURLINFO_OS_ERRNO, &os_errno);
		if (os_errno == EACCES || os_errno == EPERM)
			return fail(EXIT_FAILED, "no permission to connect to %s", r->a->socket);
		return fail(EXIT_FAILED,
			    "no service answers on %s: start it (systemctl start snapd, or snapd "
			    "--store DIR --socket PATH), or name its socket with --socket",
			    r->a->socket);
	}
	return fail(EXIT_FAILED, "the service on %s did not answer: %s", r->a->socket,
		    *r->reason ? r->reason : curl_easy_strerror(rc));
}

/* What the service answered: *ret, or its error as a message. */
static int parse_answer(struct request *r, json_t **ret)
{
	const char *text = NULL, *code = NULL;
	long status = 0;
	json_t *o;
	int rc;

	curl_easy_getinfo(r->curl, CURLINFO_RESPONSE_CODE, &status);
	o = json_loadb(r->answer.data ? r->answer.data : "", r->answer.len, 0, NULL);
	if (status < STATUS_ERROR && json_is_object(o)) {
		*ret = o;
		return 0;
	}
	json_unpack(o, "{s?s s?s}", "error", &text, "code", &code);
	progress_clear();
	if (text && !r->uploads && !strcmp(code ? code : "", "invalid"))
		rc = fail(EXIT_USAGE, "%s", text);
	else if (text)
		rc = fail(exit_code_of(code), "%s", text);
	else
		rc = fail(EXIT_FAILED, "%s does not answer like snapd (HTTP %ld)", r->a->socket,
			  status);
	json_decref(o);
	return rc;
}

static int perform(struct request *r, json_t **ret)
{
	CURLcode rc = curl_easy_perform(r->curl);

	return rc ? transport_failed(r, rc) : parse_answer(r, ret);
}

int call(const struct args *a, const char *method, json_t *body_stolen, json_t **ret,
	 const char *fmt, const char *value1, const char *value2)
{
	_cleanup_(cleanup_request) struct request r = {0};
	int rc;

	r.body = body_stolen ? json_dumps(body_stolen, JSON_COMPACT) : NULL;
	json_decref(body_stolen);
	rc = request_init(&r, a, method, fmt, value1, value2);
	if (rc)
		return rc;
	if (r.body || !strcmp(method, "POST")) {
		r.headers = curl_slist_append(NULL, "Content-Type: application/json");
		curl_easy_setopt(r.curl, CURLOPT_HTTPHEADER, r.headers);
		curl_easy_setopt(r.curl, CURLOPT_POSTFIELDS, r.body ? r.body : "");
	}
	return perform(&r, ret);
}

/* ---- jobs ---- */

static json_int_t job_id(json_t *job)
{
	return json_integer_value(json_object_get(job, "id"));
}

static const char *job_text(json_t *job, const char *key)
{
	const char *s = json_string_value(json_object_get(job, key));

	return s ? s : "";
}

static void show_progress(const struct args *a, json_t *job)
{
	json_t *p = json_object_get(job, "progress");
	const char *unit = job_text(p, "unit"), *phase = job_text(p, "phase");

	progress_show(a, *phase ? phase : job_text(job, "kind"),
		      (uint64_t)json_integer_value(json_object_get(p, "done")),
		      (uint64_t)json_integer_value(json_object_get(p, "total")),
		      !strcmp(unit, "bytes"));
}

static int cancel_job(const struct args *a, const char *id)
{
	json_t *ignored = NULL;
	int rc;

	progress_clear();
	fprintf(stderr, "snapctl: cancelling job %s ...\n", id);
	rc = call(a, "DELETE", NULL, &ignored, "/v1/jobs/%s", id, NULL);
	json_decref(ignored);
	/* It may have ended by itself just now: the next look tells. */
	return rc == EXIT_CONFLICT ? 0 : rc;
}

static bool ended(json_t *job)
{
	const char *state = job_text(job, "state");

	return strcmp(state, "queued") != 0 && strcmp(state, "running") != 0;
}

/* *job is replaced by what the job has become. */
static int wait_job(const struct args *a, json_t **job)
{
	bool cancelled = false;
	json_t *answer = NULL;
	char id[24];
	int rc = 0;

	snprintf(id, sizeof(id), "%lld", (long long)job_id(*job));
	while (!rc && !ended(*job)) {
		show_progress(a, *job);
		if (interrupted && !cancelled) {
			rc = cancel_job(a, id);
			cancelled = true;
		}
		if (!rc)
			rc = call(a, "GET", NULL, &answer, "/v1/jobs/%s?wait=" POLL_MS, id, NULL);
		if (!rc) {
			json_decref(*job);
			*job = json_incref(json_object_get(answer, "job"));
			json_decref(answer);
		}
	}
	progress_clear();
	return rc;
}

static int job_outcome(json_t *job, json_t **ret)
{
	json_t *error = json_object_get(job, "error");

	if (!strcmp(job_text(job, "state"), "done")) {
		*ret = json_incref(json_object_get(job, "result"));
		return 0;
	}
	if (!strcmp(job_text(job, "state"), "cancelled"))
		return fail(EXIT_FAILED, "cancelled: job %lld (%s)", (long long)job_id(job),
			    job_text(job, "kind"));
	return fail(exit_code_of(job_text(error, "code")), "%s", job_text(error, "text"));
}

int run_job(const struct args *a, const char *method, json_t *body_stolen, json_t **ret,
	    const char *fmt, const char *value1, const char *value2)
{
	json_t *answer = NULL, *job;
	int rc;

	catch_interrupt();
	rc = call(a, method, body_stolen, &answer, fmt, value1, value2);
	if (rc)
		return rc;
	job = json_incref(json_object_get(answer, "job"));
	json_decref(answer);
	rc = wait_job(a, &job);
	if (!rc)
		rc = job_outcome(job, ret);
	json_decref(job);
	return rc;
}

/* ---- long bodies ---- */

struct flow {
	struct request *r;
	const char *what;
	uint64_t done, total;
	const struct download *down;
	const struct upload *up;
	int code; /* exit code of a callback that gave up */
};

static int on_flow(void *opaque, curl_off_t dltotal, curl_off_t dlnow, curl_off_t ultotal,
		   curl_off_t ulnow)
{
	struct flow *f = opaque;

	if (dltotal > 0 && f->down)
		f->total = (uint64_t)dltotal;
	progress_show(f->r->a, f->what, f->done, f->total, true);
	return interrupted != 0;
}

static size_t on_download(char *data, size_t one, size_t len, void *opaque)
{
	struct flow *f = opaque;
	long status = 0;

	curl_easy_getinfo(f->r->curl, CURLINFO_RESPONSE_CODE, &status);
	if (status >= STATUS_ERROR)
		return append(data, one, len, &f->r->answer);
	f->code = f->down->write(f->down->opaque, data, len);
	f->done += len;
	return f->code ? 0 : len;
}

static size_t on_upload(char *data, size_t one, size_t len, void *opaque)
{
	struct flow *f = opaque;
	long n = f->up->read(f->up->opaque, data, one * len);

	if (n < 0) {
		f->code = (int)-n;
		return CURL_READFUNC_ABORT;
	}
	f->done += (uint64_t)n;
	return (size_t)n;
}

static void flow_init(struct flow *f, struct request *r)
{
	f->r = r;
	catch_interrupt();
	curl_easy_setopt(r->curl, CURLOPT_XFERINFOFUNCTION, on_flow);
	curl_easy_setopt(r->curl, CURLOPT_XFERINFODATA, f);
	curl_easy_setopt(r->curl, CURLOPT_NOPROGRESS, 0L);
	curl_easy_setopt(r->curl, CURLOPT_BUFFERSIZE, 512L << 10);
}

static int flow_run(struct flow *f, json_t **ret)
{
	CURLcode rc = curl_easy_perform(f->r->curl);
	long status = 0;

	progress_clear();
	if (f->code)
		return f->code;
	if (rc == CURLE_ABORTED_BY_CALLBACK && interrupted)
		return fail(EXIT_FAILED, "cancelled: %s", f->what);
	if (rc == CURLE_PARTIAL_FILE)
		return fail(EXIT_FAILED, "cut off by the service: see its log, or snapctl jobs");
	if (rc)
		return transport_failed(f->r, rc);
	curl_easy_getinfo(f->r->curl, CURLINFO_RESPONSE_CODE, &status);
	return f->down && status < STATUS_ERROR ? 0 : parse_answer(f->r, ret);
}

int download(const struct args *a, const struct download *d, const char *fmt, const char *value)
{
	_cleanup_(cleanup_request) struct request r = {0};
	struct flow f = {.what = d->what, .down = d};
	json_t *ignored = NULL;
	int rc = request_init(&r, a, "GET", fmt, value, NULL);

	if (rc)
		return rc;
	flow_init(&f, &r);
	curl_easy_setopt(r.curl, CURLOPT_WRITEFUNCTION, on_download);
	curl_easy_setopt(r.curl, CURLOPT_WRITEDATA, &f);
	rc = flow_run(&f, &ignored);
	json_decref(ignored);
	return rc;
}

int upload(const struct args *a, const struct upload *u, const char *path, json_t **ret)
{
	_cleanup_(cleanup_request) struct request r = {0};
	struct flow f = {.what = u->what, .up = u, .total = u->total_bytes};
	char type[128];
	int rc = request_init(&r, a, "POST", path, NULL, NULL);

	if (rc)
		return rc;
	r.uploads = true;
	flow_init(&f, &r);
	snprintf(type, sizeof(type), "Content-Type: %s", u->type);
	r.headers = curl_slist_append(NULL, type);
	r.headers = curl_slist_append(r.headers, "Transfer-Encoding: chunked");
	r.headers = curl_slist_append(r.headers, "Expect:");
	curl_easy_setopt(r.curl, CURLOPT_HTTPHEADER, r.headers);
	curl_easy_setopt(r.curl, CURLOPT_POST, 1L);
	curl_easy_setopt(r.curl, CURLOPT_UPLOAD_BUFFERSIZE, 512L << 10);
	curl_easy_setopt(r.curl, CURLOPT_READFUNCTION, on_upload);
	curl_easy_setopt(r.curl, CURLOPT_READDATA, &f);
	return flow_run(&f, ret);
}
