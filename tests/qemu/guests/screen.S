/* SPDX-License-Identifier: MIT */
/*
 * screen: a real-mode guest in VGA mode 13h that draws one short line a step, param_pages of them, and
 * then rests.  "s 0000002a" for each step; "S" when it is done.
 */
	.code16
	.section .text
	.globl main
main:
	movw	$0x13, %ax
	int	$0x10
	cli
	movw	$0xa000, %ax
	movw	%ax, %es
	movl	$0, step
1:	incl	step
	/* 40 pixels at (step * 8191 mod 63000), colour = step */
	movl	step, %eax
	imull	$8191, %eax, %eax
	xorl	%edx, %edx
	movl	$63000, %ecx
	divl	%ecx
	movw	%dx, %di
	movw	$40, %cx
	movb	step, %al
2:	movb	%al, %es:(%di)
	incw	%di
	loop	2b
	movl	step, %ebx
	movb	$'s', %al
	call	print_line
	movl	param_pause, %ecx
	jecxz	4f
3:	decl	%ecx
	jnz	3b
4:	movl	step, %eax
	cmpl	%eax, param_pages
	jne	1b
	movl	step, %ebx
	movb	$'S', %al
	call	print_line
5:	hlt
	jmp	5b

#include "serial.inc"

	.balign 4
step:	.long	0
