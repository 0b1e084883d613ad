package roster

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	firstPause     = 250 * time.Millisecond
	longestPause   = 10 * time.Second
	connectRetries = 4  // until a server has answered: the address may be wrong
	loadRetries    = 20 // about two minutes
)

// Pauses are the waiting times between retries: each is twice the last, with jitter.
type pauses struct {
	maxRetries int // in a row, once a server has answered; 0 means no limit
	retries    int
	isAnswered bool
}

// reset starts again with the shortest pause, after a call has succeeded.
func (p *pauses) reset() {
	p.retries, p.isAnswered = 0, true
}

// wait sleeps before the next retry, or returns an error if there is none.
func (p *pauses) wait(ctx context.Context, failure *Error) error {
	limit := p.maxRetries
	if !p.isAnswered && failure.Reason == Disconnected {
		limit = connectRetries
	}
	if !failure.IsRetryable() || limit > 0 && p.retries >= limit {
		return failure
	}
	longest := min(firstPause<<min(p.retries, 16), longestPause)
	p.retries++
	select {
	case <-time.After(failure.RetryDelay + longest/2 + rand.N(longest/2)):
		return nil
	case <-ctx.Done():
		return ErrorFrom(ctx.Err())
	}
}
