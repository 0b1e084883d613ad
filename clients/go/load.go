package roster

import (
	"context"
	"fmt"
	"io"
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	rosterv1 "example.com/roster/clients/go/roster/v1"
)

const (
	rowFramingBytes     = 6 // a tag, and a length below 4 GiB
	messageFramingBytes = 64
)

// Load sends rows through a bulk method, such as client.Users.BulkCreateUsers, each exactly once, and returns the
// summary of the load.
//
// Each message of up to 5,000 rows is answered by an ack, in order; onAck, which may be nil, is called with it. Its
// failures list the rows that were not written, and why. The rows are read, and acks passed to onAck, by the calling
// goroutine. An error of either ends the load, and is returned as it is. The load stays open then.
//
// The options may be nil. Without a load_id, the load gets a random one. Messages that the server refuses with a
// retryable error are sent again, with increasing pauses, and a stream that breaks is opened again, up to 20 times in
// a row without progress; if no server has answered yet, 4 times. At most 4 messages are in memory.
//
// A load that was interrupted is continued by another call with the same load_id, options and rows, in the same order:
// rows that are settled are skipped, and BulkService.ListBulkLoadFailures returns their failures. With return_ids they
// are sent again instead, so that each row has its ack, with its first outcome.
func Load[Request any, Message interface {
	*Request
	proto.Message
}, Row proto.Message](
	ctx context.Context,
	method func(context.Context, ...grpc.CallOption) (grpc.BidiStreamingClient[Request, rosterv1.BulkWriteResponse], error),
	options *rosterv1.BulkOptions,
	rows iter.Seq2[Row, error],
	onAck func(*rosterv1.BulkAck) error,
) (*rosterv1.BulkSummary, error) {
	options = proto.CloneOf(options)
	if options == nil {
		options = &rosterv1.BulkOptions{}
	}
	if options.LoadId == "" && !options.ValidateOnly {
		options.LoadId = newUUID()
	}
	if onAck == nil {
		onAck = func(*rosterv1.BulkAck) error { return nil }
	}
	next, stop := iter.Pull2(rows)
	defer stop()
	load := &loader[Request]{
		method:    method,
		options:   options,
		newFields: func() (*Request, fields) { return newMessage[Request, Message]() },
		next: func() (proto.Message, error, bool) {
			row, err, ok := next()
			return row, err, ok
		},
		onAck:  onAck,
		pauses: pauses{maxRetries: loadRetries},
	}
	return load.run(ctx)
}

// Fields set the fields of a message, whose rows have another type and another name in each method.
type fields struct {
	message protoreflect.Message
}

func newMessage[Request any, Message interface {
	*Request
	proto.Message
}]() (*Request, fields) {
	request := new(Request)
	return request, fields{Message(request).ProtoReflect()}
}

func (f fields) set(name protoreflect.Name, value any) {
	f.message.Set(f.message.Descriptor().Fields().ByName(name), protoreflect.ValueOf(value))
}

// rows returns the only repeated field.
func (f fields) rows() protoreflect.FieldDescriptor {
	all := f.message.Descriptor().Fields()
	for i := range all.Len() {
		if field := all.Get(i); field.IsList() {
			return field
		}
	}
	panic(fmt.Sprintf("%s is not a message of a bulk method", f.message.Descriptor().FullName()))
}

// A loader runs one load, over one or more streams.
type loader[Request any] struct {
	method    func(context.Context, ...grpc.CallOption) (grpc.BidiStreamingClient[Request, rosterv1.BulkWriteResponse], error)
	options   *rosterv1.BulkOptions
	newFields func() (*Request, fields)
	next      func() (proto.Message, error, bool)
	onAck     func(*rosterv1.BulkAck) error
	pauses    pauses

	opened   *rosterv1.BulkOpened // of the first stream
	window   window[Request]
	row      proto.Message // that did not fit into the last message
	read     int64         // rows of the source, the one that did not fit included
	isCut    bool          // the message that finishes the load is in the window
	isBroken bool          // the stream accepts no messages
	summary  *rosterv1.BulkSummary
}

// A callerError is an error of the rows or of onAck.
type callerError struct{ error }

func (l *loader[Request]) run(ctx context.Context) (*rosterv1.BulkSummary, error) {
	for {
		err := l.stream(ctx)
		if err == nil {
			return l.summary, nil
		}
		if own, ok := err.(callerError); ok {
			return nil, own.error
		}
		if ctx.Err() != nil {
			return nil, ErrorFrom(ctx.Err())
		}
		failure := ErrorFrom(err)
		if l.options.ValidateOnly { // it is not stored, so it can't be resumed
			return nil, failure
		}
		if err := l.pauses.wait(ctx, failure); err != nil {
			return nil, err
		}
	}
}

type received struct {
	response *rosterv1.BulkWriteResponse
	err      error
}

// stream runs one stream, until the summary or an error.
func (l *loader[Request]) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.window.restart()
	l.isBroken = false
	call, err := l.method(ctx, grpc.WaitForReady(false))
	if err != nil {
		return err
	}
	first, fields := l.newFields()
	fields.set("options", l.options.ProtoReflect())
	l.isBroken = call.Send(first) != nil // Recv returns the reason

	// The answers to all messages in flight, so that acks that wait for a send to end don't stop the server.
	answers := make(chan received, windowSize+2)
	go func() {
		for {
			response, err := call.Recv()
			select {
			case answers <- received{response, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		var answer received
		select {
		case answer = <-answers:
		case <-ctx.Done(): // then no answer may come, not even the error
			return ctx.Err()
		}
		if answer.err == io.EOF {
			return unavailable("the server ended the stream without a summary")
		}
		if answer.err != nil {
			return answer.err
		}
		if isDone, err := l.receive(ctx, answer.response); err != nil || isDone {
			return err
		}
		if err := l.send(call); err != nil {
			return err
		}
	}
}

// receive applies an answer, and returns whether it completes the load.
func (l *loader[Request]) receive(ctx context.Context, response *rosterv1.BulkWriteResponse) (bool, error) {
	switch event := response.Event.(type) {
	case *rosterv1.BulkWriteResponse_Opened:
		if l.opened == nil {
			l.opened = event.Opened
			l.pauses.reset()
		}
	case *rosterv1.BulkWriteResponse_Ack:
		return false, l.acknowledge(ctx, event.Ack)
	case *rosterv1.BulkWriteResponse_Summary:
		// A summary ends the load only if it is FINISHED (a server that stops sends one too) and nothing but the
		// finish message is pending: if a message was refused that an earlier stream had recorded, the acks of
		// those after it are still to come.
		if event.Summary.State == rosterv1.BulkLoad_FINISHED && len(l.window.messages) <= 1 {
			l.summary = event.Summary
			return true, nil
		}
	}
	return false, nil
}

func (l *loader[Request]) acknowledge(ctx context.Context, ack *rosterv1.BulkAck) error {
	if l.window.dropStaleAnswer() {
		return nil
	}
	if !l.window.isFor(ack.Offset) {
		return unavailable(fmt.Sprintf("the server sent an unexpected ack for row %d", ack.Offset))
	}
	if ack.Error != nil {
		if err := l.pauses.wait(ctx, errorFromStatus(status.FromProto(ack.Error))); err != nil {
			return callerError{err} // a refusal does not end the stream, so another stream does not help
		}
		l.window.refuse()
		return nil
	}
	l.window.acknowledge()
	l.pauses.reset()
	if err := l.onAck(ack); err != nil {
		return callerError{err}
	}
	return nil
}

// send sends what the window has, and fills it.
func (l *loader[Request]) send(call grpc.BidiStreamingClient[Request, rosterv1.BulkWriteResponse]) error {
	for !l.isBroken && l.window.stale == 0 {
		if !l.window.canSend() {
			if l.window.isFull() || l.isCut {
				return nil
			}
			next, err := l.cut()
			if err != nil {
				return callerError{err}
			}
			l.window.add(next)
		}
		l.isBroken = call.Send(l.window.nextUnsent()) != nil
	}
	return nil
}

// cut returns the next message, as large as allowed; the one that finishes the load after the last row.
func (l *loader[Request]) cut() (message[Request], error) {
	start := l.opened.NextOffset
	if l.options.ReturnIds {
		start = 0
	}
	request, fields := l.newFields()
	rows := fields.rows()
	list := fields.message.Mutable(rows).List()
	size := messageFramingBytes
	offset := max(l.read, start)
	if l.row != nil {
		offset--
	}
	for list.Len() < int(l.opened.MaxRows) {
		row, err := l.nextRow()
		if err != nil {
			return message[Request]{}, err
		}
		if row == nil {
			break
		}
		if l.read <= start {
			continue
		}
		if row.ProtoReflect().Descriptor() != rows.Message() {
			return message[Request]{}, fmt.Errorf("the rows are of type %s, but the method takes %s",
				row.ProtoReflect().Descriptor().FullName(), rows.Message().FullName())
		}
		size += proto.Size(row) + rowFramingBytes
		if list.Len() > 0 && size > int(l.opened.MaxBytes) {
			l.row = row
			break
		}
		list.Append(protoreflect.ValueOfMessage(row.ProtoReflect()))
	}
	if l.read < start {
		return message[Request]{}, fmt.Errorf("the source has only %d rows, but the load already has %d", l.read, start)
	}
	fields.set("offset", offset)
	if list.Len() == 0 {
		fields.set("finish", true)
		l.isCut = true
	}
	return message[Request]{request, offset, list.Len()}, nil
}

// nextRow returns the next row of the source; nil after the last one.
func (l *loader[Request]) nextRow() (proto.Message, error) {
	if row := l.row; row != nil {
		l.row = nil
		return row, nil
	}
	row, err, ok := l.next()
	if err != nil || !ok {
		return nil, err
	}
	l.read++
	return row, nil
}
