/* SPDX-License-Identifier: MIT */
/*
 * counter: a real-mode guest, all of it emulated by a KVM without hardware.  Each step writes
 * the number of the step into one of the pages from 0x10000 on, after it has compared what
 * was there with a table, and says the number on the serial port: "c 0000002a".  What a
 * rollback gets wrong it tells with "E".
 */
	.code16
	.section .text
	.globl main
main:
	movl	$0, step
1:	incl	step
	/* page = step * 37 mod pages, at most 120 */
	movl	step, %eax
	imull	$37, %eax, %eax
	xorl	%edx, %edx
	divl	param_pages
	movw	%dx, %si
	shlw	$2, %si
	shlw	$8, %dx
	addw	$0x1000, %dx
	movw	%dx, %fs
	movl	table(%si), %ebx
	cmpl	%ebx, %fs:0x123
	jne	wrong
	movl	step, %ebx
	movl	%ebx, %fs:0x123
	movl	%ebx, table(%si)
	movb	$'c', %al
	call	print_line
	movl	param_pause, %ecx
	testl	%ecx, %ecx
	jz	1b
2:	decl	%ecx
	jnz	2b
	jmp	1b
wrong:
	movl	step, %ebx
	movb	$'E', %al
	call	print_line
3:	hlt
	jmp	3b

#include "serial.inc"

	.balign 4
step:	.long	0
table:	.skip	128 * 4
