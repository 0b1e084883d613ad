package roster

import (
	"context"
	"fmt"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"

	rosterv1 "example.com/roster/clients/go/roster/v1"
)

// The server sends a response at least every 10 s. A proxy may keep a connection to a server that is gone.
const silence = 35 * time.Second

// Watch iterates over the responses of the change feed, without end, from a token on; "" means from now on. Without
// entities, it reports all of them.
//
// Store the changes of a response together with its token before the next iteration, then no change is lost or
// applied to an older state: after a restart, pass the stored token.
//
// A watch that breaks with an error that a retry can fix continues with the last token, after a pause. There is no
// limit to the retries, but if no server has answered yet, Watch gives up after a few seconds: the address may be
// wrong. Other errors end the iteration. After the reasons FEED_RESET and TOKEN_EXPIRED, make a new copy from an
// export.
func Watch(ctx context.Context, changes rosterv1.ChangeServiceClient, token string, entities ...rosterv1.Change_Entity,
) iter.Seq2[*rosterv1.WatchChangesResponse, error] {
	return func(yield func(*rosterv1.WatchChangesResponse, error) bool) {
		pauses := pauses{}
		wantsMore := true
		apply := func(response *rosterv1.WatchChangesResponse) bool {
			token = response.Token
			pauses.reset()
			wantsMore = yield(response, nil)
			return wantsMore
		}
		for {
			request := &rosterv1.WatchChangesRequest{Entities: entities, Token: token}
			failure := watch(ctx, changes, request, apply)
			if !wantsMore {
				return
			}
			if ctx.Err() != nil {
				yield(nil, ErrorFrom(ctx.Err()))
				return
			}
			if failure.Reason == "STATEMENT_TIMEOUT" { // the next statement may be faster
				failure.hasRetryDelay = true
			}
			if err := pauses.wait(ctx, failure); err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

// watch applies the responses of one call until it breaks, or until `apply` returns false.
func watch(ctx context.Context, changes rosterv1.ChangeServiceClient, request *rosterv1.WatchChangesRequest,
	apply func(*rosterv1.WatchChangesResponse) bool) *Error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.AfterFunc(silence, cancel)
	defer timer.Stop()
	call, err := changes.WatchChanges(ctx, request, grpc.WaitForReady(false))
	for err == nil {
		var response *rosterv1.WatchChangesResponse
		response, err = call.Recv()
		timer.Stop() // while the response is applied
		if err == nil && !apply(response) {
			return nil
		}
		timer.Reset(silence)
	}
	if ctx.Err() != nil { // by the timer: the caller looks at its own context first
		return unavailable(fmt.Sprintf("the server has sent nothing for %v", silence))
	}
	if err == io.EOF {
		return unavailable("the server ended the watch without an error")
	}
	return ErrorFrom(err)
}
