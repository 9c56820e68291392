/* SPDX-License-Identifier: MIT */
/*
 * boot: the boot sector of each test guest.  It loads the rest of the guest behind itself and
 * goes there, in real mode.
 *
 *   0x6000   where other vCPUs begin (native)
 *   0x7c00   this sector
 *   0x7e00   PARAMS, patched into the disk image by the test; then the guest's own code
 *   0x10000  and above: free for the guest
 */
	.code16
	.section .boot, "ax"
	.globl _start
_start:
	jmp	from_disk
	.org	2
	jmp	loaded		/* from bios.S */
from_disk:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	movb	%dl, drive
	movb	$0x42, %ah
	movw	$packet, %si
	int	$0x13
	jc	failed
loaded:
	cmpl	$0, param_draw
	je	main
	call	screen_on
	jmp	main
failed:
	movb	$'!', %al
	movw	$0x3f8, %dx
	outb	%al, %dx
1:	hlt
	jmp	1b

packet: .byte	16, 0
	.word	guest_sectors
	.word	0x7e00, 0
	.quad	1

	.globl drive
drive:	.byte	0
	.org	510
	.word	0xaa55

	.section .params, "aw"
	.globl params
params:	.ascii	"PARAMS!!"
	.globl param_pages, param_pause, param_cpus, param_sectors, param_draw
param_pages:	.long 64	/* of the working set */
param_pause:	.long 0		/* rounds of waiting between steps */
param_cpus:	.long 1
param_sectors:	.long 1024	/* on the disk, stamped, from sector 128 on */
param_draw:	.long 0		/* a line on the screen for each that is said */
	.org	64

/* 160 x 100 pixels of 32 bits in the 64 KiB at 0xa0000, by the Bochs display's registers: 16
 * and 32 bits of colour QEMU shows from video memory itself, with nothing copied between. */
	.section .text
screen_on:
	movw	$0x3ba, %dx
	inb	%dx, %al
	movw	$0x3da, %dx
	inb	%dx, %al
	movw	$0x3c0, %dx
	movb	$0x20, %al
	outb	%al, %dx
	movw	$mode, %si
	cld
1:	lodsw
	movw	$0x1ce, %dx
	outw	%ax, %dx
	incw	%dx
	lodsw
	outw	%ax, %dx
	cmpw	$mode_end, %si
	jne	1b
	ret
mode:	.word	1, 160, 2, 100, 3, 32, 4, 1
mode_end:
