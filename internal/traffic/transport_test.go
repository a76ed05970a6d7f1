package traffic

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net/http"
	"net/url"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// able is a transport that can do whatever Caddy asks for.
type able struct {
	http.RoundTripper
	tls, h2c, idle bool
}

var errAble = errors.New("able")

var ops = new(headers.HeaderOps)

func (*able) TLSEnabled() bool { return true }
func (a *able) EnableTLS(*reverseproxy.TLSConfig) error {
	a.tls = true
	return errAble
}

func (a *able) EnableH2C() error {
	a.h2c = true
	return errAble
}
func (*able) ProxyProtocolEnabled() bool { return true }
func (*able) OverrideHealthCheckScheme(base *url.URL, port string) {
	base.Scheme = "https" + port
}
func (*able) RequiresContentLength() bool          { return true }
func (*able) DefaultBufferSizes() (int64, int64)   { return 1, 2 }
func (*able) RequestHeaderOps() *headers.HeaderOps { return ops }
func (a *able) CloseIdleConnections()              { a.idle = true }

// bare is one that can only send.
type bare struct{ http.RoundTripper }

// TestTransportCanDoWhatTheOtherCan holds that it answers as the other one does, and as
// Caddy takes it where there is no answer.
func TestTransportCanDoWhatTheOtherCan(t *testing.T) {
	a := new(able)
	for _, test := range []struct {
		next http.RoundTripper
		can  bool
	}{{a, true}, {bare{}, false}} {
		w := &Transport{Next: test.next}
		if got := w.TLSEnabled(); got != test.can {
			t.Errorf("%T: TLSEnabled is %v", test.next, got)
		}
		if err := w.EnableTLS(nil); errors.Is(err, errAble) != test.can || err == nil {
			t.Errorf("%T: EnableTLS: %v", test.next, err)
		}
		if err := w.EnableH2C(); errors.Is(err, errAble) != test.can || err == nil {
			t.Errorf("%T: EnableH2C: %v", test.next, err)
		}
		if got := w.ProxyProtocolEnabled(); got != test.can {
			t.Errorf("%T: ProxyProtocolEnabled is %v", test.next, got)
		}
		if got := w.RequiresContentLength(); got != test.can {
			t.Errorf("%T: RequiresContentLength is %v", test.next, got)
		}
		if request, response := w.DefaultBufferSizes(); request == 1 != test.can || response == 2 != test.can {
			t.Errorf("%T: DefaultBufferSizes are %d, %d", test.next, request, response)
		}
		if got := w.RequestHeaderOps(); got == ops != test.can {
			t.Errorf("%T: RequestHeaderOps are %v", test.next, got)
		}
		u := &url.URL{Scheme: "http"}
		if w.OverrideHealthCheckScheme(u, "1"); u.Scheme == "https1" != test.can {
			t.Errorf("%T: OverrideHealthCheckScheme made it %s", test.next, u)
		}
		w.CloseIdleConnections()
		if Real(w) != test.next || Real(test.next) != test.next {
			t.Errorf("%T is not what is real", test.next)
		}
	}
	if !a.tls || !a.h2c || !a.idle {
		t.Errorf("the other transport was told %+v", a)
	}
}

// TestTransportCanDoWhatCaddyAsksFor reads in Caddy's source for which interfaces its
// proxy asks a transport, so that one that is new there fails here: all of them must be
// passed on, and a concrete type cannot be.
func TestTransportCanDoWhatCaddyAsksFor(t *testing.T) {
	file, _ := runtime.FuncForPC(reflect.ValueOf(reverseproxy.GetDialInfo).Pointer()).FileLine(0)
	asked, methods := asserted(t, filepath.Dir(file))
	if len(asked) < 6 {
		t.Fatalf("Caddy asks for %v only, says %s: look for where it does now", asked, file)
	}
	ours := reflect.TypeFor[*Transport]()
	for name, where := range asked {
		if len(methods[name]) == 0 {
			t.Errorf("%s: Caddy asks whether a transport is a %s, which is no interface of the same package", where, name)
		}
		for _, m := range methods[name] {
			if _, ok := ours.MethodByName(m); !ok {
				t.Errorf("%s: Caddy asks whether a transport is a %s, and ours has no %s", where, name, m)
			}
		}
	}
}

// asserted returns for which types the packages in a directory ask a transport, and the
// methods of their interfaces.
func asserted(t *testing.T, dir string) (asked map[string]string, methods map[string][]string) {
	asked, methods = make(map[string]string), make(map[string][]string)
	files := token.NewFileSet()
	ask := func(at token.Pos, typ ast.Expr) {
		where := files.Position(at).String()
		switch typ := typ.(type) {
		case *ast.Ident:
			asked[typ.Name] = where
		case *ast.SelectorExpr:
			asked[typ.Sel.Name] = where
		default:
			asked["type of its own"] = where
		}
	}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.TypeAssertExpr:
				if isTransport(n.X) && n.Type != nil {
					ask(n.Pos(), n.Type)
				}
			case *ast.TypeSwitchStmt:
				for _, x := range switched(n) {
					ask(n.Pos(), x)
				}
			case *ast.TypeSpec:
				if i, ok := n.Type.(*ast.InterfaceType); ok {
					for _, m := range i.Methods.List {
						for _, name := range m.Names {
							methods[n.Name.Name] = append(methods[n.Name.Name], name.Name)
						}
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return asked, methods
}

// isTransport reports whether an expression is the transport of something, or is called
// one.
func isTransport(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.SelectorExpr:
		return x.Sel.Name == "Transport"
	case *ast.Ident:
		return strings.EqualFold(x.Name, "transport")
	}
	return false
}

// switched returns the types among which a switch looks for that of a transport.
func switched(s *ast.TypeSwitchStmt) (types []ast.Expr) {
	var x ast.Expr
	switch assign := s.Assign.(type) {
	case *ast.ExprStmt:
		x = assign.X
	case *ast.AssignStmt:
		x = assign.Rhs[0]
	}
	if a, ok := x.(*ast.TypeAssertExpr); ok && isTransport(a.X) {
		for _, c := range s.Body.List {
			types = append(types, c.(*ast.CaseClause).List...)
		}
	}
	return types
}
