/* SPDX-License-Identifier: MIT */
/* A server by script; see http_script.h. */
#include "tests/lib/http_script.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/lib/check.h"

struct conn {
	struct http_script *h;
	int fd;
	SSL *ssl;
	char buf[8192]; /* what was read and is not used yet: [at, len) */
	size_t at, len;
};

/* ---- bytes, with or without TLS ---- */

static ssize_t conn_read(struct conn *c, void *p, size_t len)
{
	if (c->at == c->len) {
		ssize_t n = c->ssl ? SSL_read(c->ssl, c->buf, sizeof(c->buf))
				   : recv(c->fd, c->buf, sizeof(c->buf), 0);

		if (n <= 0)
			return n;
		c->at = 0;
		c->len = (size_t)n;
	}
	len = len < c->len - c->at ? len : c->len - c->at;
	memcpy(p, c->buf + c->at, len);
	c->at += len;
	return (ssize_t)len;
}

static bool conn_write(struct conn *c, const char *p, size_t len)
{
	while (len) {
		ssize_t n = c->ssl ? SSL_write(c->ssl, p, (int)len)
				   : send(c->fd, p, len, MSG_NOSIGNAL);

		if (n <= 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

/* A certificate for 127.0.0.1 that nobody signed but itself. */
static SSL_CTX *make_tls(char cert_file[static 64])
{
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *cert = X509_new();
	SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
	X509_EXTENSION *san = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name, "IP:127.0.0.1");
	FILE *f;
	int fd;

	check(key && cert && tls && san, "TLS");
	X509_set_version(cert, 2);
	ASN1_INTEGER_set(X509_get_serialNumber(cert), 1);
	X509_gmtime_adj(X509_getm_notBefore(cert), -60);
	X509_gmtime_adj(X509_getm_notAfter(cert), 3600);
	X509_set_pubkey(cert, key);
	X509_NAME_add_entry_by_txt(X509_get_subject_name(cert), "CN", MBSTRING_ASC,
				   (const unsigned char *)"test", -1, -1, 0);
	X509_set_issuer_name(cert, X509_get_subject_name(cert));
	X509_add_ext(cert, san, -1);
	check(X509_sign(cert, key, EVP_sha256()), "TLS");
	check(SSL_CTX_use_certificate(tls, cert) && SSL_CTX_use_PrivateKey(tls, key), "TLS");
	strcpy(cert_file, "/tmp/snapd-cert.XXXXXX");
	fd = mkstemp(cert_file);
	f = fdopen(fd, "w");
	check(f && PEM_write_X509(f, cert) && !fclose(f), "TLS");
	X509_EXTENSION_free(san);
	X509_free(cert);
	EVP_PKEY_free(key);
	return tls;
}

/* ---- a request ---- */

static size_t body_length(const char *head)
{
	const char *p = strcasestr(head, "\r\ncontent-length:");

	return p ? strtoul(p + 17, NULL, 10) : 0;
}

/* Up to the empty line; false when the client has gone. */
static bool read_head(struct conn *c, struct http_request *q)
{
	size_t n = 0;

	while (n < 4 || memcmp(q->head + n - 4, "\r\n\r\n", 4) != 0) {
		check(n < sizeof(q->head) - 1, "a head so long");
		if (conn_read(c, q->head + n, 1) != 1)
			return false;
		n++;
	}
	q->head[n] = '\0';
	return true;
}

static bool read_body(struct conn *c, struct http_request *q)
{
	size_t want = body_length(q->head);

	if (strcasestr(q->head, "\r\nexpect:") &&
	    !conn_write(c, "HTTP/1.1 100 Continue\r\n\r\n", 25))
		return false;
	q->body = want ? malloc(want) : NULL;
	while (q->len < want) {
		ssize_t n = conn_read(c, q->body + q->len, want - q->len);

		if (n <= 0)
			return false;
		q->len += (size_t)n;
	}
	return true;
}

static void next_step(struct http_script *h, const struct http_request *q, struct http_step *ret)
{
	static const struct http_step beyond = {
		.reply = "HTTP/1.1 599 Beyond\r\nContent-Length: 0\r\n\r\n"};

	pthread_mutex_lock(&h->lock);
	*ret = h->nr_requests < h->nr_steps ? h->steps[h->nr_requests] : beyond;
	check(h->nr_requests < HTTP_SCRIPT_REQUESTS, "so many requests");
	h->requests[h->nr_requests++] = *q;
	pthread_mutex_unlock(&h->lock);
}

static void dribble(struct conn *c, const char *p, size_t len)
{
	const char *body = memmem(p, len, "\r\n\r\n", 4);
	size_t head = body ? (size_t)(body + 4 - p) : 0;

	if (!conn_write(c, p, head))
		return;
	p += head;
	len -= head;
	while (len && conn_write(c, p, 1)) {
		usleep(5000);
		p++;
		len--;
	}
}

static void until_gone(struct conn *c)
{
	char byte;

	while (conn_read(c, &byte, 1) > 0)
		;
}

/* False when that was the last on this connection. */
static bool act(struct conn *c, const struct http_step *step)
{
	const size_t len = step->len ? step->len : step->reply ? strlen(step->reply) : 0;

	if (step->then == HTTP_DRIBBLE)
		dribble(c, step->reply, len);
	else if (len && !conn_write(c, step->reply, len))
		return false;
	if (step->then == HTTP_HANG)
		until_gone(c);
	if (step->then == HTTP_RESET)
		setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1},
			   sizeof(struct linger));
	return step->then == HTTP_KEEP;
}

static void serve(struct conn *c)
{
	bool more = true;

	while (more) {
		struct http_request q = {0};
		struct http_step step;

		if (!read_head(c, &q))
			return;
		pthread_mutex_lock(&c->h->lock);
		step = c->h->nr_requests < c->h->nr_steps ? c->h->steps[c->h->nr_requests]
							  : (struct http_step){0};
		pthread_mutex_unlock(&c->h->lock);
		if (!step.before_body && !read_body(c, &q)) {
			free(q.body);
			return;
		}
		next_step(c->h, &q, &step);
		more = act(c, &step);
	}
}

static void *conn_thread(void *arg)
{
	struct conn *c = arg;

	if (c->h->tls) {
		c->ssl = SSL_new(c->h->tls);
		SSL_set_fd(c->ssl, c->fd);
	}
	if (!c->ssl || SSL_accept(c->ssl) == 1)
		serve(c);
	SSL_free(c->ssl);
	pthread_mutex_lock(&c->h->lock); /* or stop would shut down who gets the number next */
	for (int i = 0; i < c->h->nr_conns; i++)
		if (c->h->conn_fds[i] == c->fd)
			c->h->conn_fds[i] = -1;
	close(c->fd);
	pthread_mutex_unlock(&c->h->lock);
	free(c);
	return NULL;
}

static void *listen_thread(void *arg)
{
	struct http_script *h = arg;

	for (;;) {
		int fd = accept4(h->listen_fd, NULL, NULL, SOCK_CLOEXEC);
		struct conn *c;

		if (fd < 0)
			return NULL;
		c = calloc(1, sizeof(*c));
		check(c && h->nr_conns < HTTP_SCRIPT_CONNS, "so many connections");
		c->h = h;
		c->fd = fd;
		pthread_mutex_lock(&h->lock);
		h->conn_fds[h->nr_conns] = fd;
		check(!pthread_create(&h->conn_threads[h->nr_conns], NULL, conn_thread, c),
		      "thread");
		h->nr_conns++;
		pthread_mutex_unlock(&h->lock);
	}
}

/* ---- start and stop ---- */

void http_script_start(struct http_script *h, bool tls)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof(sin);

	*h = (struct http_script){.lock = PTHREAD_MUTEX_INITIALIZER};
	if (tls)
		h->tls = make_tls(h->cert_file);
	h->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	check(!bind(h->listen_fd, (struct sockaddr *)&sin, len) && !listen(h->listen_fd, 64) &&
		      !getsockname(h->listen_fd, (struct sockaddr *)&sin, &len),
	      "socket");
	h->port = ntohs(sin.sin_port);
	check(!pthread_create(&h->thread, NULL, listen_thread, h), "thread");
}

void http_script_stop(struct http_script *h)
{
	shutdown(h->listen_fd, SHUT_RDWR);
	pthread_join(h->thread, NULL);
	close(h->listen_fd);
	pthread_mutex_lock(&h->lock);
	for (int i = 0; i < h->nr_conns; i++)
		if (h->conn_fds[i] >= 0)
			shutdown(h->conn_fds[i], SHUT_RDWR);
	pthread_mutex_unlock(&h->lock);
	for (int i = 0; i < h->nr_conns; i++)
		pthread_join(h->conn_threads[i], NULL);
	http_script_set(h, NULL, 0);
	SSL_CTX_free(h->tls);
	if (*h->cert_file)
		unlink(h->cert_file);
}

void http_script_set(struct http_script *h, const struct http_step *steps, int nr_steps)
{
	pthread_mutex_lock(&h->lock);
	for (int i = 0; i < h->nr_requests; i++)
		free(h->requests[i].body);
	h->nr_requests = 0;
	h->steps = steps;
	h->nr_steps = nr_steps;
	pthread_mutex_unlock(&h->lock);
}
