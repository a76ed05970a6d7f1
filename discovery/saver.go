package discovery

import (
	"log/slog"
	"time"
)

const (
	// A change is in the file after this time and that of writing it.
	saveDelay = 2 * time.Second
	// A list that takes long to write, because it is large or the disk is slow, is
	// written less often while it keeps changing: so many times as long lies between
	// the end of one writing and the next, but at most this.
	saveShare    = 100
	saveDelayMax = time.Minute
	// While the registry can be seen, the list is confirmed so often although
	// nothing changes: its age counts.
	saveEvery = 10 * time.Minute
	// A file that cannot be written is tried again after this time.
	saveRetry = time.Minute
)

// A saver keeps a directory's list in a file: it writes the list in the background
// soon after each change, and from time to time while the registry confirms it. All its
// methods are for one goroutine, which also receives from the channels of loads, saves
// and timer.
type saver struct {
	file  *savedFile // nil: nothing is kept
	loads tasks[*savedList]
	saves tasks[saving]
	timer *time.Timer // for save

	dirty   bool          // there is something to save
	rested  time.Duration // when the next save may come at the earliest
	failing bool          // the last save failed, and that was told
}

// saving is how writing the file went.
type saving struct {
	took time.Duration
	err  error
}

// newSaver returns a saver that has begun to load what was saved before.
func newSaver(w WarmStart, log *slog.Logger) *saver {
	s := &saver{
		loads: newTasks[*savedList](1), saves: newTasks[saving](1),
		timer: stoppedTimer(), rested: now(),
	}
	if w.Path == "" {
		return s
	}
	file := &savedFile{WarmStart: w, log: log}
	s.file = file
	s.loads.start(func() *savedList {
		if err := file.open(); err != nil {
			log.Warn("the list of nodes is not kept for a start without the registry", "error", err)
		}
		return file.load()
	})
	return s
}

// loading reports whether what was saved before is still being loaded.
func (s *saver) loading() bool { return s.loads.running > 0 }

// changed has the list saved soon: there is a newer one.
func (s *saver) changed() {
	if s.file == nil || s.dirty {
		return
	}
	s.dirty = true
	s.saveSoon()
}

func (s *saver) saveSoon() { s.timer.Reset(max(saveDelay, s.rested-now())) }

// save saves the list in the background if it has changed, or if it is confirmed: the
// registry is being watched.
func (s *saver) save(confirmed bool, list func() *savedList) {
	switch {
	case s.loading():
		s.saveSoon() // before that it is not known which file is ours
	case s.file.own == "" || s.saves.running > 0:
	case !s.dirty && !confirmed:
		s.timer.Reset(saveEvery)
	default:
		s.dirty = false
		l := list()
		s.saves.start(func() saving {
			began := now()
			err := s.file.save(l)
			return saving{now() - began, err}
		})
	}
}

// saved takes in how saving went.
func (s *saver) saved(r saving) {
	s.rested = now() + rest(r.took)
	failed := r.err != nil
	if failed && !s.failing {
		s.file.log.Warn("cannot keep the list of nodes for a start without the registry", "error", r.err)
	}
	s.failing = failed
	switch {
	case failed:
		s.dirty = true
		s.timer.Reset(saveRetry)
	case s.dirty:
		s.saveSoon()
	default:
		s.timer.Reset(saveEvery)
	}
}

// rest returns how long the file is left alone after a writing of it.
func rest(took time.Duration) time.Duration {
	if took > saveDelayMax/saveShare {
		return saveDelayMax
	}
	return max(saveDelay, saveShare*took)
}

// stop saves what is to be saved, and lets go of the file.
func (s *saver) stop(confirmed bool, list func() *savedList) {
	defer s.timer.Stop()
	s.loads.wait()
	for s.saves.running > 0 {
		s.saves.take(<-s.saves.done, s.saved)
	}
	if s.file == nil {
		return
	}
	if s.file.own != "" && (s.dirty || confirmed) {
		s.saved(saving{err: s.file.save(list())})
	}
	s.file.close()
}
