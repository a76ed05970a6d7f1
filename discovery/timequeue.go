package discovery

import (
	"container/heap"
	"time"
)

// A timeQueue is a heap of items, the one with the earliest time first. An item knows
// its place in it, so that it can be moved and taken out, and is in one timeQueue only.
type timeQueue[T any] struct {
	items []*T
	time  func(*T) time.Duration
	place func(*T) *int // counted from 1; 0: it is in none
}

// first returns the item with the earliest time, nil if there is none.
func (q *timeQueue[T]) first() *T {
	if len(q.items) == 0 {
		return nil
	}
	return q.items[0]
}

// firstBy is first for an item whose time has come.
func (q *timeQueue[T]) firstBy(at time.Duration) *T {
	if item := q.first(); item != nil && q.time(item) <= at {
		return item
	}
	return nil
}

func (q *timeQueue[T]) has(item *T) bool { return *q.place(item) > 0 }

// put takes an item in, or moves it to where its time has it now.
func (q *timeQueue[T]) put(item *T) {
	if q.has(item) {
		heap.Fix((*timeHeap[T])(q), *q.place(item)-1)
	} else {
		heap.Push((*timeHeap[T])(q), item)
	}
}

// remove takes an item out, if it is in.
func (q *timeQueue[T]) remove(item *T) {
	if q.has(item) {
		heap.Remove((*timeHeap[T])(q), *q.place(item)-1)
	}
}

// timeHeap is the heap.Interface of a timeQueue.
type timeHeap[T any] timeQueue[T]

func (h *timeHeap[T]) Len() int           { return len(h.items) }
func (h *timeHeap[T]) Less(i, j int) bool { return h.time(h.items[i]) < h.time(h.items[j]) }

func (h *timeHeap[T]) Swap(i, j int) {
	h.items[i], h.items[j] = h.items[j], h.items[i]
	*h.place(h.items[i]), *h.place(h.items[j]) = i+1, j+1
}

func (h *timeHeap[T]) Push(item any) {
	h.items = append(h.items, item.(*T))
	*h.place(item.(*T)) = len(h.items)
}

func (h *timeHeap[T]) Pop() any {
	last := len(h.items) - 1
	item := h.items[last]
	h.items[last] = nil
	h.items = h.items[:last]
	*h.place(item) = 0
	return item
}
