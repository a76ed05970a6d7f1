package health

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestURLAnswersWith2xx(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/", http.StatusFound)
		case "/broken":
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer server.Close()
	for path, want := range map[string]string{
		"/":       "",
		"/moved":  "health_url answered 302 Found, want 2xx",
		"/broken": "health_url answered 500 Internal Server Error, want 2xx",
	} {
		err := URL(server.URL + path)(t.Context())
		if (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	gone := URL(server.URL)
	server.Close()
	if err := gone(t.Context()); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody listens: %v", err)
	}
}
