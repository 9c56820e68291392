/* SPDX-License-Identifier: MIT */
/*
 * Running, pausing, ring-full and slot changes of the agent, for spin.
 *
 * Two vCPUs store to two pages, each with a ring of one entry.  A changer deletes the slot
 * that shows them and adds one that shows them the other way round.  A device writes and
 * marks.  The service harvests and copies while they run, then pauses, harvests, copies.
 * Nobody else harvests: the harvest thread is stopped, the worst case.
 *
 *   content[p]   version of a page; every store raises it
 *   writable[p]  KVM lets a store pass; else the store first pushes an entry, in one step
 *                with looking and storing (mmu_lock)
 *   entry        the kernel id of its slot; RESET frees it first and protects after it,
 *                and can be interrupted between any two of these steps
 *   means[id]    the agent's table: page of an entry's offset is offset ^ means[id]; a
 *                deleted id keeps its meaning until a pass
 *   dirty[p]     the service's set
 *   kicked[v]    immediate_exit and the signal
 *
 * Checked: no invalid end state, that is no deadlock; at the end of the pause the service's
 * copy of each page is the page, that is no loss.  The device never waits for a vCPU: it
 * takes no lock at all.
 *
 * Spin has to find an error with each of these (run.sh reads this list):
 *   SEED_PARK_HOLDING_LOCK a vCPU parks in the middle of curing ring-full: deadlock
 *   SEED_FULL_WAITS a vCPU with a full ring waits for someone else to harvest: deadlock
 *   SEED_LOST_KICK a vCPU clears its kick after it looked for a pause: deadlock
 *   SEED_DEVICE_WAITS a device that a pause waits for needs a ring with room: deadlock
 *   SEED_COPY_BEFORE_RESET frames are published before RESET: loss
 *   SEED_ID_REUSED a new slot gets the id of the one just deleted: loss
 *   SEED_PAUSE_SKIPS_HARVEST what was published before the pause is taken for all: loss
 *   SEED_NO_QUIESCE the pause does not wait for the device: loss
 *   SEED_OUT_IS_STOPPED a vCPU that does a store in a hole counts as stopped: loss
 */
#define VCPUS  2
#define STORES 2
#define NONE   3

byte content[2], copied[2];
bool writable[2], dirty[2];
bool shown = true; /* there is a slot, of this id, and offset 0 shows this page */
byte shown_id = 0, first = 0;
byte means[2];
bool dead[2];

bool filled[VCPUS]; /* a ring of one entry */
byte entry[VCPUS], entry_off[VCPUS], entry_page[VCPUS];

bool locked;
bool got[2], taken[VCPUS]; /* of whoever harvests */
byte taken_page[VCPUS];

bool pausing, kicked[VCPUS], device_busy;
byte stopped;

#define lock()	 atomic { !locked -> locked = true }
#define unlock() locked = false

inline collect(v)
{
	if
	:: filled[v] ->
		taken[v] = true;
		taken_page[v] = entry_page[v];
		if
		:: means[entry[v]] == NONE -> got[0] = true; got[1] = true
		:: else -> got[means[entry[v]] ^ entry_off[v]] = true
		fi
	:: else
	fi
}

inline reset(v)
{
	if
	:: taken[v] ->
		filled[v] = false;
		d_step { writable[taken_page[v]] = false; taken[v] = false; taken_page[v] = 0 }
	:: else
	fi
}

inline publish()
{
	d_step {
		dirty[0] = dirty[0] || got[0];
		dirty[1] = dirty[1] || got[1];
		got[0] = false;
		got[1] = false
	}
}

/* A pass: no ring can hold an entry of what was deleted before it began. */
inline pass()
{
	d_step {
		if :: dead[0] -> dead[0] = false; means[0] = NONE :: else fi;
		if :: dead[1] -> dead[1] = false; means[1] = NONE :: else fi
	}
}

inline harvest_locked()
{
	d_step { collect(0); collect(1) };
#ifdef SEED_COPY_BEFORE_RESET
	publish();
	reset(0);
	reset(1);
#else
	reset(0);
	reset(1);
	publish();
#endif
	pass()
}

inline harvest()
{
	lock();
	harvest_locked();
	unlock()
}

inline park()
{
	stopped++;
	atomic { !pausing -> stopped-- }
}

inline ring_full()
{
#ifdef SEED_FULL_WAITS
	!filled[me]
#else
	lock();
#ifdef SEED_PARK_HOLDING_LOCK
	if
	:: pausing -> park()
	:: else
	fi;
#endif
	harvest_locked();
	unlock()
#endif
}

/* The VMM does it, and marks. */
inline store_in_hole(p)
{
#ifdef SEED_OUT_IS_STOPPED
	stopped++;
#endif
	content[p]++;
	dirty[p] = true;
#ifdef SEED_OUT_IS_STOPPED
	stopped--;
#endif
	n++
}

proctype vcpu(byte me; byte n)
{
	byte p = 0;

outside:
#ifdef SEED_LOST_KICK
	if
	:: pausing -> park()
	:: else
	fi;
	kicked[me] = false;
#else
	kicked[me] = false;
	if
	:: pausing -> park()
	:: else
	fi;
#endif
inside:
	if
	:: n < STORES && !kicked[me] -> p = 0; goto store
	:: n < STORES && !kicked[me] -> p = 1; goto store
	:: n < STORES && kicked[me] -> goto outside
	:: n == STORES -> goto idle
	fi;
store:
	if
	:: atomic { shown && writable[p ^ first] -> content[p ^ first]++; n++ }; goto idle
	:: atomic { shown && !writable[p ^ first] && !filled[me] ->
		    filled[me] = true;
		    entry[me] = shown_id;
		    entry_off[me] = p;
		    entry_page[me] = p ^ first;
		    writable[p ^ first] = true;
		    content[p ^ first]++;
		    n++ }; goto idle
	:: shown && !writable[p ^ first] && filled[me] -> ring_full(); goto outside
	:: !shown -> store_in_hole(p); goto outside
	fi;
idle:	/* a guest that has nothing to do leaves when it is kicked */
	if
	:: n < STORES -> goto inside
	:: else
	fi;
end:	kicked[me];
	goto outside
}

/* Deletion: KVM, then the table; the new slot: the table, then KVM. */
proctype changer()
{
	byte id = 1;

	shown = false;
#ifdef SEED_ID_REUSED
	id = 0;
#else
	atomic { !locked -> dead[0] = true };
#endif
	atomic { !locked -> means[id] = 1 };
	atomic {
		writable[0] = false;
		writable[1] = false;
		shown_id = id;
		first = 1;
		shown = true
	}
}

proctype device()
{
	atomic { !pausing -> device_busy = true };
#ifdef SEED_DEVICE_WAITS
	!filled[0];
#endif
	content[0]++;
	d_step { dirty[0] = true; device_busy = false }
}

inline copy(p)
{
	if
	:: dirty[p] -> dirty[p] = false; copied[p] = content[p]
	:: else
	fi
}

proctype service()
{
	harvest();
	copy(0); /* one page early: the other waits for the pause */

	pausing = true;
	d_step { kicked[0] = true; kicked[1] = true };
	stopped >= VCPUS;
#ifndef SEED_NO_QUIESCE
	!device_busy;
#endif
#ifndef SEED_PAUSE_SKIPS_HARVEST
	harvest();
#endif
	d_step {
		copy(0);
		copy(1);
		assert(copied[0] == content[0]);
		assert(copied[1] == content[1])
	};
	pausing = false
}

init
{
	atomic {
		means[1] = NONE;
		run vcpu(0, 0);
		run vcpu(1, STORES - 1); /* one store will do */
		run changer();
		run device();
		run service()
	}
}
