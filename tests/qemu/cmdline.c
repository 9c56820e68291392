/* SPDX-License-Identifier: MIT */
/*
 * The launcher's rewriting of command lines: what people, scripts and libvirt write, what
 * has to come out, and what is refused for which reason.  Arguments are separated by
 * one blank; "+" in an expected line stands for the arguments as they came in.
 */
#include <stdio.h>
#include <string.h>

#include "adapters/qemu/cmdline.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define QMP " -chardev socket,id=snapd-qmp,fd=7 -mon chardev=snapd-qmp,mode=control"
#define RAM(bytes)                                                            \
	" -object memory-backend-memfd,id=snapd-ram,size=" bytes "B,share=on" \
	" -machine memory-backend=snapd-ram"
#define KVM " -accel kvm"

static const struct {
	const char *in, *out; /* out NULL: passed */
} rewritten[] = {
	/* by hand */
	{"-m 1024 -hda disk.img", "+" KVM RAM("1073741824") QMP},
	{"-enable-kvm -m 2G disk.img", "+" RAM("2147483648") QMP},
	{"--enable-kvm -m 1.5G", "+" RAM("1610612736") QMP},
	{"-accel kvm -m size=4G,slots=4,maxmem=16G", "+" RAM("4294967296") QMP},
	{"-accel kvm -m 100K", "+" RAM("106496") QMP},
	{"-accel kvm", "+" RAM("134217728") QMP},
	{"-accel kvm -m 64 -m 128", "+" RAM("134217728") QMP},
	{"-machine q35,accel=kvm:tcg -smp 4 -cpu host -vga std -vnc :1", "+" RAM("134217728") QMP},
	{"-M pc,accel=kvm -append accel=tcg -kernel k", "+" RAM("134217728") QMP},
	{"-accel kvm -append -S -kernel help", "+" RAM("134217728") QMP},
	{"-accel kvm -name help -S", "+" RAM("134217728") QMP},
	{"-accel kvm,dirty-ring-size=4096", "-accel kvm,dirty-ring-size=0" RAM("134217728") QMP},
	/* backends */
	{"-accel kvm -m 64 -object memory-backend-memfd,id=m,size=64M,share=on -M "
	 "pc,memory-backend=m",
	 "+" QMP},
	{"-accel kvm -object memory-backend-memfd,id=m,size=64M -M pc,memory-backend=m",
	 "-accel kvm -object memory-backend-memfd,id=m,size=64M,share=on -M "
	 "pc,memory-backend=m" QMP},
	{"-accel kvm -object memory-backend-ram,id=m,size=64M -M pc,memory-backend=m",
	 "-accel kvm -object memory-backend-memfd,id=m,size=64M,share=on -M "
	 "pc,memory-backend=m" QMP},
	{"-accel kvm -object memory-backend-file,id=m,size=64M,mem-path=/dev/shm/x,share=yes "
	 "-M pc,memory-backend=m",
	 "+" QMP},
	{"-accel kvm -m 2G -object memory-backend-ram,id=a,size=1G -object "
	 "{\"qom-type\":\"memory-backend-ram\",\"id\":\"b\",\"size\":1073741824} -numa "
	 "node,memdev=a -numa node,memdev=b",
	 "-accel kvm -m 2G -object memory-backend-memfd,id=a,size=1G,share=on -object "
	 "{\"qom-type\":\"memory-backend-memfd\",\"id\":\"b\",\"size\":1073741824,\"share\":true} "
	 "-numa "
	 "node,memdev=a -numa node,memdev=b" QMP},
	/* our own line again */
	{"-m 1024" KVM RAM("1073741824") " -chardev socket,id=snapd-qmp,fd=3 -mon "
					 "chardev=snapd-qmp,mode=control",
	 "-m 1024" KVM RAM("1073741824") QMP},
	/* libvirt 9, as virt-install makes it */
	{"-name guest=web,debug-threads=on -S -object "
	 "{\"qom-type\":\"secret\",\"id\":\"masterKey0\",\"format\":\"raw\",\"file\":\"/var/lib/"
	 "k.aes\"} "
	 "-machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram -accel "
	 "kvm "
	 "-cpu host,migratable=on -m 2048 -object "
	 "{\"qom-type\":\"memory-backend-memfd\",\"id\":\"pc.ram\",\"share\":true,\"size\":"
	 "2147483648} "
	 "-overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -uuid "
	 "3f2b9a63-4a0e-4c4d-a3bc-6f5b5f5d3a51 -no-user-config -nodefaults -chardev "
	 "socket,id=charmonitor,fd=25,server=on,wait=off -mon "
	 "chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew -global "
	 "kvm-pit.lost_tick_policy=delay -no-hpet -no-shutdown -global ICH9-LPC.disable_s3=1 -boot "
	 "strict=on -device "
	 "{\"driver\":\"pcie-root-port\",\"port\":16,\"chassis\":1,\"id\":\"pci.1\",\"bus\":\"pcie."
	 "0\"} "
	 "-blockdev "
	 "{\"driver\":\"file\",\"filename\":\"/var/lib/libvirt/images/"
	 "web.qcow2\",\"node-name\":\"s1\"} "
	 "-netdev "
	 "{\"type\":\"tap\",\"fd\":\"27\",\"vhost\":true,\"vhostfd\":\"29\",\"id\":\"hostnet0\"} "
	 "-device "
	 "{\"driver\":\"virtio-net-pci\",\"netdev\":\"hostnet0\",\"mac\":\"52:54:00:01:02:03\"} "
	 "-chardev "
	 "pty,id=charserial0 -device {\"driver\":\"virtio-balloon-pci\",\"id\":\"balloon0\"} "
	 "-sandbox "
	 "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg "
	 "timestamp=on",
	 "+" QMP},
	/* questions */
	{"-version", NULL},
	{"--version", NULL},
	{"-m 4G -machine help", NULL},
	{"-device virtio-net-pci,help", NULL},
	{"-cpu ?", NULL},
	{"-accel help -device vfio-pci", NULL},
	{"-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp "
	 "unix:/var/lib/libvirt/qemu/capabilities.monitor.sock,server=on,wait=off -pidfile "
	 "/var/lib/libvirt/qemu/capabilities.pidfile -daemonize",
	 NULL},
};

static const struct {
	const char *in, *reason;
} refused[] = {
	{"-accel tcg", "accelerator tcg"},
	{"-M q35,accel=tcg:kvm", "accelerator tcg:kvm"},
	{"-accel tcg -accel kvm", "accelerator tcg"},
	{"-m 0", "-m 0"},
	{"-m 1X", "-m 1X"},
	{"-m -5", "-m -5"},
	{"-smp", "-smp needs a value"},
	{"-accel kvm -device vfio-pci,host=01:00.0", "VFIO"},
	{"-accel kvm -device {\"driver\":\"vfio-pci\",\"host\":\"01:00.0\"}", "VFIO"},
	{"-accel kvm -device driver=vfio-pci,host=1", "VFIO"},
	{"-accel kvm -device vhost-user-fs-pci,chardev=c", "vhost-user"},
	{"-accel kvm -netdev vhost-user,chardev=c,id=n", "vhost-user"},
	{"-accel kvm -netdev {\"type\":\"vhost-vdpa\",\"id\":\"n\"}", "vhost-vdpa"},
	{"-accel kvm -nic vhost-user,chardev=c", "vhost-user"},
	{"-accel kvm -device ivshmem-plain,memdev=m", "unseen"},
	{"-accel kvm -mem-path /dev/shm", "-mem-path"},
	{"-accel kvm -readconfig vm.cfg", "-readconfig"},
	{"-accel kvm -object memory-backend-memfd,id=m,size=1G,hugetlb=on -M memory-backend=m",
	 "huge pages"},
	{"-accel kvm -object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"m\",\"hugetlb\":true}",
	 "huge pages"},
	{"-accel kvm -object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x", "private"},
	{"-accel kvm -object memory-backend-file,id=m,mem-path=/dev/shm/x,share=off", "private"},
	{"-accel kvm -object memory-backend-file,id=m,mem-path=/etc/passwd,share=on", "on a disk"},
	{"-accel kvm -object memory-backend-file,id=m,mem-path=/etc/x,share=on", "on a disk"},
	{"-accel kvm -object sev-guest,id=s -M confidential-guest-support=s", "confidential"},
	{"-accel kvm -M q35,confidential-guest-support=s", "confidential"},
};

static struct strv words(const char *qemu, const char *text)
{
	_cleanup_free_ char *copy = strdup(text);
	struct strv s = {0};
	char *rest = copy;

	strv_add(&s, qemu);
	for (char *w; (w = strsep(&rest, " "));)
		if (*w)
			strv_add(&s, w);
	return s;
}

static char *joined(const struct strv *s)
{
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	for (size_t i = 1; i < s->n; i++)
		fprintf(f, "%s%s", i > 1 ? " " : "", s->v[i]);
	fclose(f);
	return text;
}

static int run(struct cmdline_request req, const char *in, char **out, struct err *e)
{
	struct strv argv = words("qemu-system-x86_64", in);
	struct cmdline c;
	int rc;

	req.monitor_fd = 7;
	*out = NULL;
	rc = cmdline_complete(&req, argv.v, &c, e);
	if (!rc) {
		check(!strcmp(c.argv.v[0], "qemu-system-x86_64"), "%s", c.argv.v[0]);
		*out = joined(&c.argv);
		cmdline_deinit(&c);
	}
	strv_deinit(&argv);
	return rc;
}

static void rewriting(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(rewritten); i++) {
		const char *in = rewritten[i].in, *want = rewritten[i].out;
		_cleanup_free_ char *out = NULL, *expected = NULL;
		struct err e = {0};
		int rc = run((struct cmdline_request){0}, in, &out, &e);

		check(rc == (want ? 0 : CMDLINE_PASS), "%s: %d %s", in, rc, e.text);
		if (!want)
			continue;
		check(asprintf(&expected, "%s%s", *want == '+' ? in : "", want + (*want == '+')) >
			      0,
		      "memory");
		check(!strcmp(out, expected), "\n in   %s\n out  %s\n want %s", in, out, expected);
	}
}

static void refusals(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(refused); i++) {
		_cleanup_free_ char *out = NULL;
		struct err e = {0};
		int rc = run((struct cmdline_request){0}, refused[i].in, &out, &e);

		check(rc == -EINVAL && strstr(e.text, refused[i].reason), "%s: %d %s",
		      refused[i].in, rc, e.text);
	}
}

/* What was completed is completed to the same line again. */
static void idempotent(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(rewritten); i++) {
		_cleanup_free_ char *once = NULL, *twice = NULL;

		if (!rewritten[i].out)
			continue;
		run((struct cmdline_request){0}, rewritten[i].in, &once, NULL);
		check(!run((struct cmdline_request){0}, once, &twice, NULL), "%s", once);
		check(!strcmp(once, twice), "\n once  %s\n twice %s", once, twice);
	}
}

static void expect_restore(const struct cmdline_request *req, const char *in, const char *want,
			   const char *reason)
{
	_cleanup_free_ char *out = NULL;
	struct err e = {0};
	int rc = run(*req, in, &out, &e);

	if (want)
		check(!rc && !strcmp(out, want), "\n in   %s\n out  %s\n want %s: %s", in, out,
		      want, e.text);
	else
		check(rc == -EINVAL && strstr(e.text, reason), "%s: %d %s", in, rc, e.text);
}

static void restores(void)
{
	const struct replacement disks[] = {{"/a,b.img", "/c,d.img"}};
	const struct replacement macs[] = {{"52:54:00:01:02:03", "52:54:00:0a:0b:0c"}};
	struct cmdline_request r = {.restore = true};

	expect_restore(&r, "-accel kvm -m 64 -incoming tcp:0:4444 -loadvm x",
		       "-accel kvm -m 64" RAM("67108864") QMP " -incoming defer", NULL);
	expect_restore(&r, "-accel kvm -netdev tap,id=n,fd=33",
		       "-accel kvm -netdev tap,id=n,fd=33" RAM("134217728") QMP " -incoming defer",
		       NULL);
	r.recorded = true;
	expect_restore(&r, "-accel kvm -netdev tap,id=n,fd=33", NULL, "descriptor");
	expect_restore(&r, "-accel kvm -chardev socket,id=c,fd=3,server=on", NULL, "descriptor");
	r.disks = disks;
	r.nr_disks = 1;
	expect_restore(&r, "-accel kvm -drive file=/a,,b.img,if=virtio",
		       "-accel kvm -drive file=/c,,d.img,if=virtio" RAM("134217728") QMP
		       " -incoming defer",
		       NULL);
	expect_restore(&r, "-accel kvm -hda /a,b.img",
		       "-accel kvm -hda /c,d.img" RAM("134217728") QMP " -incoming defer", NULL);
	expect_restore(
		&r,
		"-accel kvm -blockdev {\"driver\":\"raw\",\"file\":{\"filename\":\"/a,b.img\"}}",
		"-accel kvm -blockdev "
		"{\"driver\":\"raw\",\"file\":{\"filename\":\"/c,d.img\"}}" RAM("134217728") QMP
		" -incoming defer",
		NULL);
	expect_restore(&r, "-accel kvm -drive file=/a,if=virtio -name /a,b.img", NULL, "no disk");
	r.nr_disks = 0;
	r.macs = macs;
	r.nr_macs = 1;
	expect_restore(&r, "-accel kvm -device e1000,mac=52:54:00:01:02:03,netdev=n",
		       "-accel kvm -device e1000,mac=52:54:00:0a:0b:0c,netdev=n" RAM("134217728")
			       QMP " -incoming defer",
		       NULL);
	expect_restore(&r, "-accel kvm -device e1000", NULL, "no MAC");
}

static void names(void)
{
	struct strv argv = words("qemu", "-accel kvm -name guest=web,debug-threads=on");
	struct cmdline c;

	check(!cmdline_complete(&(struct cmdline_request){0}, argv.v, &c, NULL), "name");
	check(c.guest && !strcmp(c.guest, "web"), "%s", c.guest);
	cmdline_deinit(&c);
	strv_deinit(&argv);
}

static void sizes(void)
{
	check(props_size("1", 1) == 1 && props_size("2k", 1) == 2048, "sizes");
	check(props_size("8E", 1) == 0 && props_size("1GB", 1) == 0 && !props_size("", 1), "sizes");
	check(props_size("0x10", 1) == 16 && !props_size("nan", 1) && !props_size("inf", 1),
	      "sizes");
}

int main(void)
{
	rewriting();
	refusals();
	idempotent();
	restores();
	names();
	sizes();
	printf("%zu command lines, %zu refusals\n", ARRAY_SIZE(rewritten), ARRAY_SIZE(refused));
	return 0;
}
