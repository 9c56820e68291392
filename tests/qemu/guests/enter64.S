/* SPDX-License-Identifier: MIT */
/*
 * enter64: from real mode to 64-bit code at CPL 3 over identity page tables (2 MiB pages, 4 GiB), for
 * the boot vCPU and, with param_cpus = 2, for another one; I/O ports stay allowed (IOPL 3),
 * interrupts stay off.  Then native_main(cpu).
 *
 *   0x70000  PML4, PDPT, four PDs     0x78000, 0x7c000  tops of the stacks
 */
#define TABLES 0x70000

	.code16
	.section .text
	.globl main
main:
	/* where the other vCPU begins: a far jump to other_cpu */
	movb	$0xea, 0x6000
	movw	$other_cpu, 0x6001
	movw	$0, 0x6003
	movw	$(TABLES >> 4), %ax
	movw	%ax, %es
	xorw	%di, %di
	movw	$0x6000 / 4, %cx
	xorl	%eax, %eax
	rep stosl
	movl	$(TABLES + 0x1007), %es:0
	xorw	%di, %di
	movl	$(TABLES + 0x2007), %eax
1:	movl	%eax, %es:0x1000(%di)
	addl	$0x1000, %eax
	addw	$8, %di
	cmpw	$32, %di
	jne	1b
	xorw	%di, %di
	movl	$0x87, %eax
2:	movl	%eax, %es:0x2000(%di)
	addl	$0x200000, %eax
	addw	$8, %di
	cmpw	$0x4000, %di
	jne	2b
	xorl	%ebp, %ebp
	jmp	go
other_cpu:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movl	$1, %ebp
go:	lgdtl	gdt_pointer
	movl	$0x20, %eax
	movl	%eax, %cr4
	movl	$TABLES, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	$0x80010001, %eax
	movl	%eax, %cr0
	ljmpl	$0x08, $long_mode

	.code64
long_mode:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	testl	%ebp, %ebp
	jnz	3f
	cmpl	$2, param_cpus
	jb	3f
	/* INIT, then the start at 0x6000, to all but this one */
	movl	$0xfee00300, %ebx
	movl	$0x000c4500, (%rbx)
	movl	$10000, %ecx
4:	decl	%ecx
	jnz	4b
	movl	$0x000c4606, (%rbx)
3:	movl	%ebp, %eax
	shll	$14, %eax
	addl	$0x78000, %eax
	movl	%eax, %esp
	movl	%ebp, %edi
	pushq	$(0x18 | 3)
	pushq	%rax
	pushq	$0x3002
	pushq	$(0x20 | 3)
	pushq	$native_main
	iretq

	.balign 16
gdt:	.quad	0
	.quad	0x00209b0000000000	/* 0x08 code, CPL 0 */
	.quad	0x0000930000000000	/* 0x10 data, CPL 0 */
	.quad	0x0000f30000000000	/* 0x18 data, CPL 3 */
	.quad	0x0020fb0000000000	/* 0x20 code, CPL 3 */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt
