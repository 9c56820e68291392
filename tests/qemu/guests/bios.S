/* SPDX-License-Identifier: MIT */
/*
 * bios: a guest as firmware (-bios): the 64 KiB before 4 GiB, of which the PC shows the same at
 * 0xf0000.  The guest's image is copied to 0x7c00, and begins after its boot sector's part:
 * for guests that need no BIOS, and start at once where emulating one takes seconds.
 */
	.code16
	.section .rom, "ax"
	.globl _start
_start:
image:	.incbin GUEST
image_end:

copy:	cli
	cld
	movw	$0xf000, %ax
	movw	%ax, %ds
	xorw	%ax, %ax
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	xorw	%si, %si
	movw	$0x7c00, %di
	movw	$((image_end - image) / 4), %cx
	rep movsl
	movw	%ax, %ds
	/* "jmp main" of the boot sector stands behind its header */
	ljmp	$0, $0x7c02

	.org	0xfff0
	ljmp	$0xf000, $copy
	.org	0x10000
