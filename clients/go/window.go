package roster

// A window has the messages of a load that are not acknowledged, oldest first.
//
//	| sent, waiting for acks | not sent yet |
//	^ oldest                 ^ nextUnsent()
//
// A server refuses a message without ending the stream, if a retry can succeed. The messages sent after it then don't
// follow the last row written, so the server refuses them too. All of them are sent again, once the answers to them,
// which are stale, have arrived.
type window[Request any] struct {
	messages []message[Request]
	sent     int // of the messages, by the current stream
	stale    int // answers still to come to messages that will be sent again
}

// A message of a load. The last one has no rows, and finishes the load.
type message[Request any] struct {
	request *Request
	offset  int64 // of the first row
	rows    int
}

const windowSize = 4

func (w *window[Request]) isFull() bool {
	return len(w.messages) >= windowSize
}

func (w *window[Request]) canSend() bool {
	return w.stale == 0 && w.sent < len(w.messages)
}

func (w *window[Request]) add(next message[Request]) {
	w.messages = append(w.messages, next)
}

// nextUnsent returns the next message to send, and counts it as sent.
func (w *window[Request]) nextUnsent() *Request {
	w.sent++
	return w.messages[w.sent-1].request
}

// restart begins with a new stream, which has been sent nothing.
func (w *window[Request]) restart() {
	w.sent, w.stale = 0, 0
}

// dropStaleAnswer returns whether the answer that has arrived is stale, and counts it.
func (w *window[Request]) dropStaleAnswer() bool {
	if w.stale == 0 {
		return false
	}
	w.stale--
	return true
}

// isFor returns whether an answer for this offset is for the oldest message.
func (w *window[Request]) isFor(offset int64) bool {
	return w.sent > 0 && w.messages[0].offset == offset
}

// refuse sends everything again, after the oldest message was refused.
func (w *window[Request]) refuse() {
	w.stale, w.sent = w.sent-1, 0
}

// acknowledge removes and returns the oldest message, which is settled.
func (w *window[Request]) acknowledge() message[Request] {
	oldest := w.messages[0]
	w.messages[0] = message[Request]{} // frees its rows
	w.sent--
	w.messages = w.messages[1:]
	return oldest
}
