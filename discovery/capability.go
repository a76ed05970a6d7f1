package discovery

// As finds a T in a registry: what is beyond [Watcher] and [Announcer] is an interface
// of its own, such as [Verifier], [Reader] or [Overrider], and not every registry has it.
// The T is the registry itself, or else what it wraps.
//
// A type that changes some methods of a registry has Unwrap, so that nothing is lost of
// what that can do besides:
//
//	type logged struct{ discovery.Registry }
//
//	func (l logged) Unwrap() discovery.Registry { return l.Registry }
func As[T any](registry any) (T, bool) {
	for {
		if t, ok := registry.(T); ok {
			return t, true
		}
		wrapper, ok := registry.(interface{ Unwrap() Registry })
		if !ok {
			var none T
			return none, false
		}
		registry = wrapper.Unwrap()
	}
}
