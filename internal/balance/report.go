package balance

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// The header fields in which a node reports its load, or trailers, as gRPC's servers send
// them. They are those of ORCA (https://github.com/cncf/xds/blob/main/xds/data/orca/v3/orca_load_report.proto),
// which Envoy and gRPC read, too.
const (
	loadField       = "Endpoint-Load-Metrics"
	binaryLoadField = "Endpoint-Load-Metrics-Bin"

	// maxReport is how many bytes of a report are read.
	maxReport = 4 << 10
	// mostReported is the most that a report counts as. 1 is a node at its limit.
	mostReported = 100
)

// The numbers of the fields in a binary report.
const (
	numberCPU         = 1
	numberApplication = 9
)

// TakeLoad takes the report of its load that a node has sent off the header of a response,
// and returns it: application_utilization, or where that is 0 or missing cpu_utilization.
// What is no report is taken off as well, and not believed.
func TakeLoad(h http.Header) (load float64, ok bool) {
	text, binary := h[loadField], h[binaryLoadField]
	if text == nil && binary == nil {
		return 0, false
	}
	delete(h, loadField)
	delete(h, binaryLoadField)
	var r report
	switch {
	case len(text) > 0 && len(text[0]) <= maxReport:
		format, value, _ := strings.Cut(strings.TrimSpace(text[0]), " ")
		switch format {
		case "JSON":
			r.readJSON(value)
		case "TEXT":
			r.readText(value)
		case "BIN":
			r.readBinary(value)
		}
	case len(binary) > 0 && len(binary[0]) <= maxReport:
		r.readBinary(binary[0])
	}
	return r.load()
}

// report is what counts of a report. Nil is what it does not say.
type report struct{ application, cpu *float64 }

func (r *report) load() (float64, bool) {
	for _, v := range []*float64{r.application, r.cpu} {
		if v != nil && (*v > 0 || v == r.cpu) && *v >= 0 && *v <= math.MaxFloat64 {
			return min(*v, mostReported), true
		}
	}
	return 0, r.application != nil && *r.application == 0
}

func (r *report) readJSON(value string) {
	// The names are those of the format; a library that makes JSON of the message by
	// itself writes them in the other way.
	var v struct {
		Application      *float64 `json:"application_utilization"`
		CPU              *float64 `json:"cpu_utilization"`
		ApplicationCamel *float64 `json:"applicationUtilization"`
		CPUCamel         *float64 `json:"cpuUtilization"`
	}
	if json.Unmarshal([]byte(value), &v) != nil {
		return
	}
	r.application, r.cpu = v.Application, v.CPU
	if r.application == nil {
		r.application = v.ApplicationCamel
	}
	if r.cpu == nil {
		r.cpu = v.CPUCamel
	}
}

func (r *report) readText(value string) {
	for pair := range strings.SplitSeq(value, ",") {
		name, number, _ := strings.Cut(pair, "=")
		v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil {
			continue
		}
		switch strings.TrimSpace(name) {
		case "application_utilization":
			r.application = &v
		case "cpu_utilization":
			r.cpu = &v
		}
	}
}

func (r *report) readBinary(value string) {
	// gRPC leaves the padding out, others do not.
	message, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.TrimSpace(value), "="))
	if err != nil {
		return
	}
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return
		}
		message = message[n:]
		if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
			return
		}
		if kind == protowire.Fixed64Type {
			bits, _ := protowire.ConsumeFixed64(message)
			v := math.Float64frombits(bits)
			switch number {
			case numberApplication:
				r.application = &v
			case numberCPU:
				r.cpu = &v
			}
		}
		message = message[n:]
	}
}
