/* SPDX-License-Identifier: MIT */
/*
 * The pure parts of the S3 client: signatures against the examples of AWS's documentation;
 * credentials from each place, and from none; answers that are and that are no lists.
 */
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/backup/s3_creds.h"
#include "snapd/backup/s3_sign.h"
#include "snapd/backup/s3_xml.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define EMPTY_SHA256 "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

static char dir[] = "/tmp/snapd-s3-parts.XXXXXX";
static struct err e;

/* "Authenticating requests: Using the Authorization Header", GET object and list objects. */
static void test_signatures(void)
{
	static const struct s3_creds creds = {
		.access_key = "AKIAIOSFODNN7EXAMPLE",
		.secret_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
	};
	struct s3_to_sign w = {.method = "GET",
			       .path = "/test.txt",
			       .query = "",
			       .host = "examplebucket.s3.amazonaws.com",
			       .payload_sha256 = EMPTY_SHA256,
			       .date = "20130524T000000Z",
			       .range = "bytes=0-9",
			       .region = "us-east-1"};
	char auth[S3_AUTH_BYTES];

	s3_sign(&w, &creds, auth);
	check(!strcmp(auth,
		      "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/"
		      "aws4_request,SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
		      "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
	      "%s", auth);
	w.path = "/";
	w.query = "max-keys=2&prefix=J";
	w.range = NULL;
	s3_sign(&w, &creds, auth);
	check(strstr(auth, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
	      "%s", auth);
}

static void test_encode(void)
{
	char buf[64];

	check(s3_encode(buf, "a/b c+~\xc3\xa4%", true) == 20, "%s", buf);
	check(!strcmp(buf, "a/b%20c%2B~%C3%A4%25"), "%s", buf);
	s3_encode(buf, "a/b", false);
	check(!strcmp(buf, "a%2Fb"), "%s", buf);
}

/* ---- credentials ---- */

static const char *file(const char *name, mode_t mode, const char *text)
{
	static char paths[4][128];
	static int turn;
	char *path = paths[turn++ % 4];
	_cleanup_fd_ int fd = -1;

	snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
	unlink(path);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) &&
		      !fchmod(fd, mode),
	      "%s", path);
	return path;
}

static void forget_environment(void)
{
	static const char *const names[] = {
		"AWS_ACCESS_KEY_ID",	 "AWS_SECRET_ACCESS_KEY",	"AWS_SESSION_TOKEN",
		"AWS_PROFILE",		 "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
		"CREDENTIALS_DIRECTORY",
	};

	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		unsetenv(names[i]);
	setenv("HOME", dir, 1);
}

/* "ACCESS SECRET TOKEN REGION", or the error. */
static const char *load(const struct objstore_opts *opts)
{
	const struct s3_creds *c;
	static char text[sizeof(*c)];
	int r;

	err_clear(&e);
	r = s3_creds_load(opts, &c, &e);
	if (r)
		snprintf(text, sizeof(text), "%d", r);
	else
		snprintf(text, sizeof(text), "%s %s %s %s", c->access_key, c->secret_key, c->token,
			 c->region);
	s3_creds_free(c);
	return text;
}

#define LOADS(opts, want) \
	check(!strcmp(load(opts), want), "'%s', not '%s': %s", load(opts), want, e.text)
#define FAILS(opts, code) check(atoi(load(opts)) == -(code), "%s: %s", load(opts), e.text)

static void test_places(void)
{
	struct objstore_opts opts = {0};
	char path[128];

	forget_environment();
	FAILS(&opts, ENOKEY);
	check(strstr(e.text, "AWS_ACCESS_KEY_ID"), "%s", e.text);

	/* from the last place to the first */
	snprintf(path, sizeof(path), "%s/.aws", dir);
	check(!mkdir(path, 0700), "%s", path);
	file(".aws/config", 0600,
	     "[default]\nregion=r0\n[profile p]\naws_access_key_id=C\n"
	     "aws_secret_access_key=CS\nregion = r1\n");
	FAILS(&opts, ENOKEY);
	setenv("AWS_PROFILE", "p", 1);
	LOADS(&opts, "C CS  r1");
	file(".aws/credentials", 0600,
	     "# comment\n[default]\naws_access_key_id = D\n"
	     "aws_secret_access_key\t=\tDS \r\n\n; more\n"
	     "[p]\naws_access_key_id=P\ns3 =\n  nested = 1\n"
	     "aws_secret_access_key=P/S+=\naws_session_token=PT");
	LOADS(&opts, "P P/S+= PT r1");
	opts.profile = "default";
	LOADS(&opts, "D DS  r0");
	setenv("CREDENTIALS_DIRECTORY", dir, 1);
	file("s3-credentials", 0444, "[default]\naws_access_key_id=Y\naws_secret_access_key=YS\n");
	LOADS(&opts, "Y YS  r0");
	setenv("AWS_ACCESS_KEY_ID", "E", 1);
	setenv("AWS_SECRET_ACCESS_KEY", "ES", 1);
	LOADS(&opts, "E ES  r0");
	setenv("AWS_SESSION_TOKEN", "ET", 1);
	LOADS(&opts, "E ES ET r0");
	unsetenv("CREDENTIALS_DIRECTORY");
	opts.credentials_file =
		file("given", 0400, "[default]\naws_access_key_id=G\naws_secret_access_key=GS\n");
	LOADS(&opts, "G GS  r0");
}

static void test_refused(void)
{
	struct objstore_opts opts = {.profile = "default"};

	forget_environment();
	setenv("AWS_SHARED_CREDENTIALS_FILE",
	       file("open", 0640, "[default]\naws_access_key_id=A\naws_secret_access_key=S\n"), 1);
	FAILS(&opts, EPERM);
	check(strstr(e.text, "chmod 600"), "%s", e.text);

	/* ~/.aws/config may be open, unless the secret is in it */
	setenv("AWS_SHARED_CREDENTIALS_FILE", file("empty", 0600, ""), 1);
	file(".aws/config", 0644, "[default]\naws_access_key_id=A\naws_secret_access_key=S\n");
	FAILS(&opts, EPERM);
	file(".aws/config", 0644, "[default]\nregion=r\n");
	FAILS(&opts, ENOKEY);

	setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file", 1);
	FAILS(&opts, ENOENT);
	opts.credentials_file = file("a", 0600, "[default]\naws_access_key_id=A\n");
	FAILS(&opts, ENOKEY);
	opts.credentials_file = file("b", 0600, "[default]\nnonsense\n");
	FAILS(&opts, EINVAL);
	opts.credentials_file =
		file("c", 0600, "[default]\naws_access_key_id=A B\naws_secret_access_key=S\n");
	FAILS(&opts, EINVAL);
	check(!strstr(e.text, "A B"), "%s", e.text);
	opts.credentials_file = "/dev/null";
	FAILS(&opts, EPERM);
	setenv("AWS_ACCESS_KEY_ID", "A\r\nX: y", 1);
	setenv("AWS_SECRET_ACCESS_KEY", "S", 1);
	opts.credentials_file = NULL;
	FAILS(&opts, EINVAL);
}

/* ---- XML ---- */

#define OBJECT(key, size, time)                                                \
	"<Contents><Key>" key "</Key><Size>" size "</Size><LastModified>" time \
	"</LastModified></Contents>"
#define NOW "2026-01-01T00:00:00.000Z"

static int parse(const char *objects, struct s3_page *page)
{
	char xml[4096];

	snprintf(xml, sizeof(xml),
		 "<ListBucketResult><IsTruncated>true</IsTruncated>%s</ListBucketResult>", objects);
	return s3_parse_page(xml, strlen(xml), page);
}

static void test_pages(void)
{
	static const char *const bad[] = {
		OBJECT("", "1", NOW),
		OBJECT("k", "-1", NOW),
		OBJECT("k", "", NOW),
		OBJECT("k", "9999999999999999999", NOW),
		OBJECT("k", "0x1", NOW),
		OBJECT("k", "1", "yesterday"),
		OBJECT("k", "1", "2026-01-01"),
		OBJECT("k</Key><Key>k", "1", NOW),
		OBJECT("k&#0;", "1", NOW),
		"<Contents/>",
		"<Contents>",
		"<IsTruncated>maybe</IsTruncated>",
	};
	struct s3_page page;
	char deep[2048] = "";

	check(!parse(OBJECT("a&lt;\xc3\xa4", "18", NOW) OBJECT("b", "0", "2026-01-01T00:00:00Z"),
		     &page),
	      "a page");
	check(page.truncated && page.nr == 2 && !strcmp(page.objects[0].key, "a<\xc3\xa4") &&
		      page.objects[0].info.size == 18 && page.objects[1].info.mtime_s == 1767225600,
	      "what it says");
	s3_page_free(&page);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		check(parse(bad[i], &page) == -EPROTO, "bad page %zu", i);
	for (int i = 0; i < 40; i++)
		strcat(deep, "<x>");
	for (int i = 0; i < 40; i++)
		strcat(deep, "</x>");
	check(parse(deep, &page) == -EPROTO, "deep");
	check(!parse("<Owner><ID><a>x</a></ID></Owner>", &page), "what we do not know");
	s3_page_free(&page);
}

int main(void)
{
	char command[64];

	check(sodium_init() >= 0 && mkdtemp(dir), "%s", dir);
	test_signatures();
	test_encode();
	test_places();
	test_refused();
	test_pages();
	snprintf(command, sizeof(command), "rm -rf %s", dir);
	return system(command) ? 1 : 0;
}
