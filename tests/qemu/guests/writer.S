/* SPDX-License-Identifier: MIT */
/*
 * writer: a real-mode guest that counts in memory and on its disk.  Each step reads sector 100 with int
 * 13h and compares the number there with the one that it wrote last, then writes the next: "w 0000002a" on
 * the serial port for each, "E" when disk and memory are not of one moment.
 */
#define SECTOR 100
#define BUFFER 0x10000

	.code16
	.section .text
	.globl main
main:
	movl	$0, step
1:	movb	$0x42, %ah
	call	transfer
	movw	$(BUFFER >> 4), %ax
	movw	%ax, %fs
	movl	step, %ebx
	cmpl	%ebx, %fs:0
	jne	wrong
	incl	step
	movl	step, %ebx
	movl	%ebx, %fs:0
	movw	$0x4300, %ax
	call	transfer
	movl	step, %ebx
	movb	$'w', %al
	call	print_line
	movl	param_pause, %ecx
	testl	%ecx, %ecx
	jz	1b
2:	decl	%ecx
	jnz	2b
	jmp	1b

/* %ah: 0x42 reads, 0x43 writes; what the BIOS gives up is tried again. */
transfer:
	movw	%ax, function
	movb	$3, tries
3:	movw	function, %ax
	movb	drive, %dl
	movw	$transfer_packet, %si
	int	$0x13
	cli
	jnc	4f
	decb	tries
	jnz	3b
	jmp	wrong
4:	ret

wrong:
	movl	step, %ebx
	movb	$'E', %al
	call	print_line
5:	hlt
	jmp	5b

#include "serial.inc"

	.balign 4
step:	.long	0
function: .word	0
tries:	.word	0
transfer_packet:
	.byte	16, 0
	.word	1
	.word	0, BUFFER >> 4
	.quad	SECTOR
