package view

import (
	"bufio"
	"encoding/json"
	"io"
)

// An Array writes a JSON array element by element: a large fleet is never one string.
type Array struct {
	w       *bufio.Writer
	encoder *json.Encoder
	any     bool
}

// NewArray returns an array that is written to w.
func NewArray(w io.Writer) *Array {
	b := bufio.NewWriterSize(w, 64<<10)
	return &Array{w: b, encoder: json.NewEncoder(b)}
}

// Add writes an element. Where that fails, this and all that follows does nothing.
func (a *Array) Add(v any) {
	separator := byte('[')
	if a.any {
		separator = ','
	}
	a.any = true
	_ = a.w.WriteByte(separator)
	_ = a.encoder.Encode(v)
}

// End completes the array. What fails once something was written is the client's
// connection, and nobody is there to be told.
func (a *Array) End() {
	if !a.any {
		_ = a.w.WriteByte('[')
	}
	_, _ = a.w.WriteString("]\n")
	_ = a.w.Flush()
}
