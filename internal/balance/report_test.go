package balance

import (
	"encoding/base64"
	"math"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// binary returns a report in the binary form, with fields that do not matter around.
func binary(application, cpu float64) string {
	var b []byte
	b = protowire.AppendTag(b, numberCPU, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, math.Float64bits(cpu))
	b = protowire.AppendTag(b, 3, protowire.VarintType) // rps
	b = protowire.AppendVarint(b, 17)
	b = protowire.AppendTag(b, 8, protowire.BytesType) // named_metrics
	b = protowire.AppendBytes(b, []byte("\x0a\x03foo\x11\x9a\x99\x99\x99\x99\x99\xb9\x3f"))
	b = protowire.AppendTag(b, numberApplication, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, math.Float64bits(application))
	return base64.StdEncoding.EncodeToString(b)
}

func TestTakeLoad(t *testing.T) {
	const none = -1
	for _, c := range []struct {
		field, value string
		want         float64
	}{
		{loadField, `JSON {"application_utilization": 0.3, "cpu_utilization": 0.9, "named_metrics": {"x": 1}}`, 0.3},
		{loadField, `JSON {"cpuUtilization": 0.9, "applicationUtilization": 0.3}`, 0.3},
		{loadField, `JSON {"cpu_utilization": 0.9}`, 0.9},
		{loadField, `JSON {"application_utilization": 0, "cpu_utilization": 0.9}`, 0.9},
		{loadField, `JSON {"application_utilization": 0}`, 0},
		{loadField, `JSON {"cpu_utilization": 0}`, 0},
		{loadField, `JSON {"mem_utilization": 0.9}`, none},
		{loadField, `JSON {"application_utilization": "NaN"}`, none},
		{loadField, `JSON {"application_utilization": 1e999}`, none},
		{loadField, `JSON {"application_utilization": -1}`, none},
		{loadField, `JSON {"application_utilization": 1e300}`, mostReported},
		{loadField, `JSON [`, none},
		{loadField, `TEXT application_utilization=0.3`, 0.3},
		{loadField, ` TEXT  cpu_utilization = 0.9 , application_utilization = 0.3,named_metrics.x=7`, 0.3},
		{loadField, `TEXT cpu_utilization=0.9,application_utilization=0`, 0.9},
		{loadField, `TEXT cpu_utilization=NaN`, none},
		{loadField, `TEXT cpu_utilization=Inf`, none},
		{loadField, `TEXT cpu_utilization=-0.1`, none},
		{loadField, `TEXT application_utilization=NaN,cpu_utilization=0.5`, 0.5},
		{loadField, `TEXT ,=,,x`, none},
		{loadField, `TEXT application_utilization=0.3,` + strings.Repeat("x", 1<<20), none},
		{loadField, `BIN ` + binary(0.3, 0.9), 0.3},
		{loadField, `BIN !`, none},
		{loadField, `0.3`, none},
		{loadField, ``, none},
		{binaryLoadField, binary(0.3, 0.9), 0.3},
		{binaryLoadField, strings.TrimRight(binary(0, 0.9), "="), 0.9},
		{binaryLoadField, "CZqZmZmZmbk/MQAAAAAAAABAQg4KA2ZvbxGamZmZmZm5P0IOCgNiYXIRmpmZmZmZyT8=", 0.1},
		{binaryLoadField, "CZqZ", none},
		{binaryLoadField, "", none},
	} {
		h := http.Header{"Content-Type": {"text/plain"}}
		h.Add(c.field, c.value)
		got, ok := TakeLoad(h)
		if !ok {
			got = none
		}
		if got != c.want {
			t.Errorf("%s: %.100s: load %v, want %v", c.field, c.value, got, c.want)
		}
		if len(h) != 1 {
			t.Errorf("%.100s: it is still there", c.value)
		}
	}
	if _, ok := TakeLoad(http.Header{"Content-Type": {"text/plain"}}); ok {
		t.Error("took a load of a response without")
	}
}

func FuzzTakeLoad(f *testing.F) {
	for _, seed := range []string{`JSON {"cpu_utilization": 0.9}`, "TEXT cpu_utilization=0.9", "BIN " + binary(1, 2), binary(1, 2), ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		for _, field := range []string{loadField, binaryLoadField} {
			if load, ok := TakeLoad(http.Header{field: {value}}); ok && !(load >= 0 && load <= mostReported) {
				t.Errorf("%q: load %v", value, load)
			}
		}
	})
}
