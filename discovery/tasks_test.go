package discovery

import (
	"testing"
	"testing/synctest"
)

// What tasks return is taken in together, whoever waits for it, and none outlives wait.
func TestTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tasks, ended := newTasks[int](5), make([]bool, 5)
		for i := range 4 {
			tasks.start(func() int { ended[i] = true; return i })
		}
		synctest.Wait() // all are done, though nobody has received anything
		sum := 0
		tasks.take(<-tasks.done, func(i int) { sum += i })
		if sum != 0+1+2+3 || tasks.running != 0 {
			t.Errorf("%d was returned, %d tasks are running", sum, tasks.running)
		}
		tasks.start(func() int { ended[4] = true; return 4 })
		tasks.wait()
		if tasks.running != 0 || !ended[4] {
			t.Errorf("after the end %d tasks are running", tasks.running)
		}
	})
}
