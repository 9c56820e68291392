/* SPDX-License-Identifier: MIT */
/*
 * disk: a real-mode guest that reads its disk with int 13h into one buffer after another: the
 * device model writes guest memory, and KVM never sees it.  Sectors from 128 on begin with their
 * number; each that was read is compared.  "d 0000002a" on the serial port for each
 * read, "E" for a sector that is another.
 *
 * A read that the BIOS gives up is tried again, as everybody who calls it does: where KVM does not give
 * the guest a time-stamp counter of its own, a snapshot that was taken in the middle of a read
 * comes back, for the BIOS, after its time limit.
 */
	.code16
	.section .text
	.globl main
main:
	movl	$0, step
1:	incl	step
	/* first sector = 128 + (step * 1103 mod (sectors - 8)) */
	movl	step, %eax
	imull	$1103, %eax, %eax
	xorl	%edx, %edx
	movl	param_sectors, %ecx
	subl	$8, %ecx
	divl	%ecx
	addl	$128, %edx
	movl	%edx, lba
	/* buffer: page (step * 7 mod 120) from 0x10000 on */
	movl	step, %eax
	imull	$7, %eax, %eax
	xorl	%edx, %edx
	movl	$120, %ecx
	divl	%ecx
	shlw	$8, %dx
	addw	$0x1000, %dx
	movw	%dx, segment
	movb	$3, tries
5:	movb	$0x42, %ah
	movb	drive, %dl
	movw	$read, %si
	int	$0x13
	jnc	6f
	decb	tries
	jnz	5b
	jmp	wrong
6:	cli
	movw	segment, %ax
	movw	%ax, %fs
	movl	lba, %ebx
	xorw	%di, %di
2:	cmpl	%ebx, %fs:(%di)
	jne	wrong
	incl	%ebx
	addw	$512, %di
	cmpw	$4096, %di
	jne	2b
	movl	step, %ebx
	movb	$'d', %al
	call	print_line
	movl	param_pause, %ecx
	testl	%ecx, %ecx
	jz	1b
3:	decl	%ecx
	jnz	3b
	jmp	1b
wrong:
	movl	step, %ebx
	movb	$'E', %al
	call	print_line
4:	hlt
	jmp	4b

#include "serial.inc"

	.balign 4
step:	.long	0
tries:	.long	0
read:	.byte	16, 0
	.word	8
	.word	0
segment: .word	0
lba:	.long	0, 0
