package view

import (
	"bufio"
	"encoding/json"
	"io"
)

// An Array writes a JSON array element by element: a large fleet is never one string.
type Array struct {
	w         *bufio.Writer
	encoder   *json.Encoder
	separator byte
}

// NewArray returns an array that is written to w.
func NewArray(w io.Writer) *Array {
	b := bufio.NewWriterSize(w, 64<<10)
	return &Array{b, json.NewEncoder(b), '['}
}

// Add writes an element. Where that fails, this and all that follows does nothing.
func (a *Array) Add(v any) {
	_ = a.w.WriteByte(a.separator)
	_ = a.encoder.Encode(v)
	a.separator = ','
}

// End completes the array. It returns no error: what fails here is the connection of
// whoever would be told.
func (a *Array) End() {
	if a.separator == '[' {
		_ = a.w.WriteByte('[')
	}
	_, _ = a.w.WriteString("]\n")
	_ = a.w.Flush()
}
