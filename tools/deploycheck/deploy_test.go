// Package deploycheck checks the files that run Caddy with the plugin: the unit of
// systemd, the image, and those of Compose and Kubernetes. It is a module of its own
// because it reads them with the libraries of those who define them.
package deploycheck

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

const examples = "../../examples"

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(examples, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// stopping returns how long Caddy takes to end with a Caddyfile, at most.
func stopping(t *testing.T, caddyfile string) time.Duration {
	t.Helper()
	var sum time.Duration
	for _, m := range regexp.MustCompile(`(?m)^\s*(?:grace_period|shutdown_delay|drain)\s+(\S+)$`).FindAllStringSubmatch(caddyfile, -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Fatal(err)
		}
		sum += d
	}
	if sum == 0 {
		t.Fatalf("no grace_period in:\n%s", caddyfile)
	}
	return sum
}

// spare is what a stop takes beside the times that are configured.
const spare = 10 * time.Second

// TestUnit holds that systemd takes the unit, and gives Caddy the time to leave.
func TestUnit(t *testing.T) {
	unit := read(t, "systemd/caddy-discovery.service")
	m := regexp.MustCompile(`(?m)^TimeoutStopSec=(\d+)s$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatal("the unit has no TimeoutStopSec")
	}
	seconds, _ := strconv.Atoi(m[1])
	if takes := stopping(t, read(t, "systemd/Caddyfile")); time.Duration(seconds)*time.Second < takes+spare {
		t.Errorf("systemd waits %d s for a stop that may take %v", seconds, takes)
	}

	// systemd looks whether the program is there.
	program, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "caddy-discovery.service")
	unit = strings.ReplaceAll(unit, "/usr/local/bin/caddy-discovery", program)
	if err := os.WriteFile(file, []byte(unit), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", file).CombinedOutput()
	if err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestDockerfile holds that BuildKit takes the file, that its own rules find nothing, and
// that both images run as an ordinary user.
func TestDockerfile(t *testing.T) {
	text := read(t, "container/Dockerfile")
	parsed, err := parser.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	rules := linter.New(&linter.Config{Warn: func(rule, description, _, message string, _ []parser.Range) {
		t.Errorf("%s: %s: %s", rule, description, message)
	}})
	stages, _, err := instructions.Parse(parsed.AST, rules)
	if err != nil {
		t.Fatal(err)
	}
	images := make(map[string]*instructions.Stage)
	for i := range stages {
		images[stages[i].Name] = &stages[i]
	}
	for _, name := range []string{"orders", "edge"} {
		if images[name] == nil {
			t.Fatalf("there is no stage %q", name)
		}
		if user := lastUser(images[name]); user == "" || user == "root" || user == "0" {
			t.Errorf("%s runs as user %q", name, user)
		}
	}
	if !strings.Contains(text, "\nHEALTHCHECK ") {
		t.Error("the image has no health check")
	}
}

func lastUser(s *instructions.Stage) (user string) {
	for _, command := range s.Commands {
		if u, ok := command.(*instructions.UserCommand); ok {
			user = u.User
		}
	}
	return user
}

// TestCompose holds that Compose takes the file, builds stages that there are, and waits
// for Caddy to leave.
func TestCompose(t *testing.T) {
	options, err := cli.NewProjectOptions([]string{filepath.Join(examples, "container/compose.yaml")})
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dockerfile := read(t, "container/Dockerfile")
	for name, service := range project.Services {
		if service.Build == nil {
			continue
		}
		if !strings.Contains(dockerfile, " AS "+service.Build.Target+"\n") {
			t.Errorf("%s: the Dockerfile has no stage %q", name, service.Build.Target)
		}
		if _, err := os.Stat(filepath.Join(service.Build.Context, service.Build.Dockerfile)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	takes := stopping(t, read(t, "container/Caddyfile"))
	if grace := project.Services["edge"].StopGracePeriod; grace == nil || time.Duration(*grace) < takes+spare {
		t.Errorf("Compose waits %v for a stop that may take %v", grace, takes)
	}
}

// TestMoving holds that the configurations of nginx and HAProxy, which the pages for those
// who come from there show, are accepted by these.
func TestMoving(t *testing.T) {
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/usr/local/sbin") // where Debian has them
	check := func(text string, command ...string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(command[0], append(command[1:], file)...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", command[0], err, out)
		}
	}
	check("pid "+t.TempDir()+"/pid;\nevents {}\nhttp {\naccess_log off;\n"+shown(t, "nginx")+"}\n", "nginx", "-t", "-e", "stderr", "-p", t.TempDir(), "-c")
	check(shown(t, "haproxy"), "haproxy", "-c", "-f")
}

// shown returns the configuration that the page for those who come from a program shows.
func shown(t *testing.T, program string) string {
	t.Helper()
	_, rest, found := strings.Cut(read(t, "../docs/moving/"+program+".md"), "```"+program+"\n")
	text, _, ends := strings.Cut(rest, "```")
	if !found || !ends {
		t.Fatalf("the page shows no configuration of %s", program)
	}
	return text
}

// TestKubernetes holds that each object has only the fields of its kind, and that a
// rolling update waits for the new and lets the old leave.
func TestKubernetes(t *testing.T) {
	deployments := make(map[string]*appsv1.Deployment)
	var caddyfile string
	documents := yamlutil.NewDocumentDecoder(io.NopCloser(strings.NewReader(read(t, "kubernetes/fleet.yaml"))))
	defer documents.Close()
	for buffer := make([]byte, 1<<20); ; {
		n, err := documents.Read(buffer)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch object := decode(t, buffer[:n]).(type) {
		case *appsv1.Deployment:
			deployments[object.Name] = object
		case *corev1.ConfigMap:
			caddyfile = object.Data["Caddyfile"]
		}
	}
	for name, takes := range map[string]time.Duration{
		"edge":   stopping(t, caddyfile),
		"orders": 12 * time.Second, // the sample service drains for 2 s, and waits 10 s for requests
	} {
		d := deployments[name]
		if d == nil {
			t.Fatalf("there is no deployment %q", name)
		}
		pod := d.Spec.Template.Spec
		if grace := pod.TerminationGracePeriodSeconds; grace == nil || time.Duration(*grace)*time.Second < takes+spare {
			t.Errorf("%s: a pod is killed before the %v that it may take to end are over", name, takes)
		}
		if u := d.Spec.Strategy.RollingUpdate; u == nil || u.MaxUnavailable == nil || u.MaxUnavailable.IntValue() != 0 {
			t.Errorf("%s: a rolling update takes pods away before there are new ones", name)
		}
		if pod.Containers[0].ReadinessProbe == nil {
			t.Errorf("%s: a rolling update does not wait until a new pod serves", name)
		}
	}
}

// decode reads an object of Kubernetes, and refuses fields that its kind has not.
func decode(t *testing.T, document []byte) runtime.Object {
	t.Helper()
	var kind struct{ APIVersion, Kind string }
	if err := yaml.Unmarshal(document, &kind); err != nil {
		t.Fatal(err)
	}
	var object runtime.Object
	switch kind.APIVersion + " " + kind.Kind {
	case "apps/v1 Deployment":
		object = new(appsv1.Deployment)
	case "apps/v1 StatefulSet":
		object = new(appsv1.StatefulSet)
	case "v1 ConfigMap":
		object = new(corev1.ConfigMap)
	case "v1 Service":
		object = new(corev1.Service)
	case "policy/v1 PodDisruptionBudget":
		object = new(policyv1.PodDisruptionBudget)
	default:
		t.Fatalf("an object of kind %s %s is not checked", kind.APIVersion, kind.Kind)
	}
	if err := yaml.UnmarshalStrict(document, object); err != nil {
		t.Errorf("%s: %v", kind.Kind, err)
	}
	return object
}
